// Transposes between a tensor's rows and the kernels' vectors, which hold one column of several rows.
#pragma once

#include <type_traits>

#include "vec.h"

FASTVAE_NAMESPACE_BEGIN

// to[c][r] = from[r][c]
template <class T>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  int64_t whole_rows = 0, whole_columns = 0;
  if constexpr (std::is_same_v<T, float>) {  // 4 x 4 at a time
    whole_rows = rows / 4 * 4;
    whole_columns = columns / 4 * 4;
    for (int64_t r = 0; r < whole_rows; r += 4) {
      for (int64_t c = 0; c < whole_columns; c += 4) {
        Quad e[4];
        for (int k = 0; k < 4; ++k) memcpy(&e[k], from + (r + k) * from_stride + c, sizeof(Quad));
        transpose(e);
        for (int k = 0; k < 4; ++k) memcpy(to + (c + k) * to_stride + r, &e[k], sizeof(Quad));
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r)
      to[c * to_stride + r] = from[r * from_stride + c];
}

FASTVAE_NAMESPACE_END
