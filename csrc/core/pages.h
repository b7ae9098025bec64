// Memory for what is read again in every call: packed weights, working memory, what lies between the steps of a chain.
//
// A network's packed weights are ten or more megabytes, each used once a call. On pages of 4 KB they need more entries
// than a TLB holds, and a miss under virtualization costs as much as a hundred multiply-adds: the 7x7 blocks of
// MobileNetV2 ran 6 % slower (csrc/TUNING.md). So this memory lies next to each other in regions that the kernel is
// asked to back with pages of 2 MB. Where it does not, nothing is lost.
#pragma once

#include <cstddef>

namespace mbv2 {

// Aligned to 64 bytes; std::bad_alloc if there is none. Any thread may release.
float* allocate(size_t floats);
void release(float* memory) noexcept;

struct MappedMemory {
  size_t mapped, used;  // bytes of address space; of it, handed out
};
MappedMemory mapped_memory();

}  // namespace mbv2
