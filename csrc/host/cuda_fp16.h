// See cuda_runtime.h.
#pragma once

#include <torch/headeronly/util/Half.h>

using __half = torch::headeronly::Half;
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return value; }
