// A thread's working memory: grows to what the largest call needed, then stays.
#pragma once

#include "pages.h"

namespace mbv2 {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { release(data_); }

  float* reserve(size_t floats) {
    if (floats > size_) {
      release(data_);
      data_ = nullptr;
      size_ = 0;
      data_ = allocate(floats);
      size_ = floats;
    }
    return data_;
  }

  size_t bytes() const { return size_ * sizeof(float); }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

Arena& thread_scratch();            // the calling thread's
Arena& chain_buffer(size_t index);  // the same, for what lies between the steps of a chain: two buffers in turns
size_t kept_bytes();                // of the calling thread's scratch and chain buffers

}  // namespace mbv2
