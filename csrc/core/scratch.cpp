// The memory that a thread keeps between calls, and how much it is.
#include "scratch.h"

namespace mbv2 {

namespace {
thread_local Arena chain_buffers[2];
}  // namespace

Arena& chain_buffer(size_t index) { return chain_buffers[index % 2]; }

size_t kept_bytes() { return thread_scratch().bytes() + chain_buffers[0].bytes() + chain_buffers[1].bytes(); }

}  // namespace mbv2
