// What torch's other threads do while one looks at a network (watch.h): they wake up, and compute the first layer of
// what will be called if nothing has changed.
//
// The look takes 60 to 180 us, as memory is, and a pool that has slept for a few milliseconds 35 to 90 to wake up:
// csrc/TUNING.md has what a call of MobileNetV2 gains.
#pragma once

#include <cstdint>

namespace mbv2 {

// A tensor as DLPack has it, dlpack.h 1.3 (https://github.com/dmlc/dlpack).
struct DlpackTensor {
  void* data;
  int32_t device[2];
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
constexpr uint8_t kDlpackInt = 0, kDlpackFloat = 2, kDlpackBfloat = 4;  // `code`

// Calls look(context), which does not throw, on this thread. chain: the number that the chain to be called on x is
// found by, or null where none is. Its first layer's result waits for that call, which has to come next on this thread.
void look_beside_first_layer(const int64_t* chain, const DlpackTensor& x, void* context, void (*look)(void* context));
// No such call comes, or it has been.
void forget_first_layer();

}  // namespace mbv2
