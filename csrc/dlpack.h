#ifndef EDGECLIP_DLPACK_H_
#define EDGECLIP_DLPACK_H_

#include <cstdint>

// As much of DLPack's binary interface as it takes to read a tensor:
// https://dmlc.github.io/dlpack/latest/c_api.html
namespace edgeclip::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  DeviceType type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; nullptr: C-contiguous
  uint64_t byte_offset;
};

// What a capsule called "dltensor" holds.
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

// What a capsule called "dltensor_versioned" holds.
struct Versioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(Versioned*);
  uint64_t flags;
  Tensor tensor;
};

inline constexpr uint64_t kReadOnly = 1;
inline constexpr uint32_t kMajor = 1;

}  // namespace edgeclip::dlpack

#endif  // EDGECLIP_DLPACK_H_
