#ifndef EDGECLIP_CPU_ROWS_H_
#define EDGECLIP_CPU_ROWS_H_

#include <cstdint>

namespace edgeclip::cpu {

// Name of a row in error messages: "embedding 3", or "null_text" without an index.
struct RowName {
  const char* op;
  const char* name;
  int64_t index = -1;
};

// Returns the dot product of two float32 rows, accumulated in double.
double dot(const float* x, const float* y, int64_t size);

// Returns the norm of a row. Throws std::invalid_argument if it is zero or not finite.
double checked_norm(const RowName& name, const float* row, int64_t size);

}  // namespace edgeclip::cpu

#endif  // EDGECLIP_CPU_ROWS_H_
