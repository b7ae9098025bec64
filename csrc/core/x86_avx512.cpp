// The AVX-512 tier (F, BW, DQ, VL).
#include <immintrin.h>

#include "block.h"
#include "conv.h"
#include "linear.h"
#include "rows.h"
#include "train.h"
#include "train_norm.h"
#include "train_window.h"

namespace mbv2 {
namespace {

#include "avx512_vector.h"

#include "fp32_generic.h"

}  // namespace

extern const TierKernels kernels_avx512;
const TierKernels kernels_avx512 = kKernels;

}  // namespace mbv2
