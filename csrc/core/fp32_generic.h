// All kernels of a tier that computes in fp32, and the table of them.
//
// No #pragma once: included once a tier, in place of the files below, which say what may not be done here.

#include "tile_generic.h"

#include "storage_generic.h"

#include "depthwise_generic.h"

#include "block_generic.h"
#include "conv_generic.h"
#include "linear_generic.h"
#include "rows_generic.h"
#include "train_generic.h"
#include "train_window_generic.h"

static constexpr TierKernels kKernels = {V::width,
                                         V::kMaxPanel,
                                         V::kPairedPanel,
                                         scratch_floats,
                                         work,
                                         finish,
                                         conv_scratch_floats,
                                         conv_work,
                                         linear_work,
                                         pool_work,
                                         train_scratch_floats,
                                         train_work,
                                         window_scratch_floats,
                                         window_work,
                                         multiply<double>,
                                         multiply<float>,
                                         &kRowKernels,
                                         fma_chains};
