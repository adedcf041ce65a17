// Features of any dtype, read as T and written back, for the instruction set that tile.cpp is
// compiled for.
#pragma once

#include "simd.h"
#include "tile.h"

namespace ck {
namespace CK_ISA {
namespace {

CK_FOLD float to_float_bfloat16(uint16_t h) { return bits<float>(static_cast<uint32_t>(h) << 16); }

// shifting exponent and mantissa in place leaves the value 2^112 too small, subnormals included
CK_FOLD float to_float_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const uint32_t finite = bits<uint32_t>(bits<float>(rest) * 0x1p112f);
  const uint32_t special = rest | 0x7f800000u;
  return bits<float>(sign | ((h & 0x7c00u) == 0x7c00u ? special : finite));
}

template <class T, class S, class Convert>
CK_FOLD void read_as(const S* x, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t d,
                     T* out, Convert convert) {
  for (int64_t i = 0; i < rows; ++i) {
    const S* row = x + i * row_stride;
    if (col_stride == 1)
      for (int64_t k = 0; k < d; ++k) out[i * d + k] = static_cast<T>(convert(row[k]));
    else
      for (int64_t k = 0; k < d; ++k) out[i * d + k] = static_cast<T>(convert(row[k * col_stride]));
  }
}

template <class T>
void read_rows(const void* x, Dtype dtype, int64_t row_stride, int64_t col_stride, int64_t rows,
               int64_t d, T* out) {
  const auto read = [&](auto* typed, auto convert) {
    read_as(typed, row_stride, col_stride, rows, d, out, convert);
  };
  const auto same = [](auto value) { return value; };
  switch (dtype) {
    case Dtype::kFloat:
      return read(static_cast<const float*>(x), same);
    case Dtype::kDouble:
      return read(static_cast<const double*>(x), same);
    case Dtype::kBFloat16:
      return read(static_cast<const uint16_t*>(x), to_float_bfloat16);
    case Dtype::kHalf:
      return read(static_cast<const uint16_t*>(x), to_float_half);
  }
}

CK_FOLD uint16_t to_bfloat16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// The addition rounds where the last bit of the result lies, subnormals included.
CK_FOLD uint16_t to_half(float x) {
  const uint32_t u = bits<uint32_t>(x), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  const uint32_t least = magnitude & 0x7f800000u;
  const uint32_t exponent = least < 0x38800000u ? 0x38800000u : least;
  const float finite = bits<float>(magnitude) * 0x1p112f * 0x1p-110f;  // inf where too large
  const uint32_t sum = bits<uint32_t>(bits<float>(exponent + 0x07800000u) + finite);
  const uint32_t rounded = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  return static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : rounded));
}

template <class T, class S, class Convert>
CK_FOLD void write_as(const T* x, int64_t size, S* out, Convert convert) {
  for (int64_t i = 0; i < size; ++i) out[i] = convert(x[i]);
}

template <class T>
void write(const T* x, int64_t size, Dtype dtype, void* out) {
  const auto same = [](auto value) { return value; };
  switch (dtype) {
    case Dtype::kFloat:
      return write_as(x, size, static_cast<float*>(out), same);
    case Dtype::kDouble:
      return write_as(x, size, static_cast<double*>(out), same);
    case Dtype::kBFloat16:
      return write_as(x, size, static_cast<uint16_t*>(out), to_bfloat16);
    case Dtype::kHalf:
      return write_as(x, size, static_cast<uint16_t*>(out), to_half);
  }
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
