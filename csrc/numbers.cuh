// bfloat16 and FP8 (E4M3) numbers, and the 16-byte groups that device memory is read and written in.
//
// Conversions round to nearest even. The portable forms are what the emulation runs and what devices before sm_89 use
// for E4M3; tests/emulation compares them with torch for every bfloat16 and across E4M3's rounding boundaries.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "platform.cuh"

namespace mds {

constexpr float kE4M3Max = 448.0f, kE5M6Max = 65024.0f;

__host__ __device__ __forceinline__ uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

__host__ __device__ __forceinline__ float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

__host__ __device__ __forceinline__ float to_float(bf16 x) { return bits_float(uint32_t(x) << 16); }

__host__ __device__ __forceinline__ bf16 to_bf16(float x) {
#ifdef __CUDA_ARCH__
  bf16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  uint32_t bits = float_bits(x);
  if (x != x) return bf16(0x7fff);  // as the GPU's conversion: one NaN
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

// Rounds a float as if it were stored in bfloat16: fused kernels do so where separate ones would have stored it.
__host__ __device__ __forceinline__ float round_to_bf16(float x) { return to_float(to_bf16(x)); }

// Saturating conversion, in integer arithmetic: |x| beyond 448 becomes 448 (infinities too), NaN stays NaN.
__host__ __device__ __forceinline__ e4m3 to_e4m3_portable(float x) {
  uint32_t bits = float_bits(x);
  uint32_t sign = (bits >> 24) & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7f;
  if (magnitude >= 0x43e00000) return e4m3(sign | 0x7e);  // 448 and more
  if (magnitude < 0x3c800000) {
    // Below 2^-6 numbers are whole multiples of 2^-9. Adding 2^14 leaves exactly those multiples in the last bits of
    // the float, rounded to nearest even by the addition itself.
    uint32_t sum = float_bits(bits_float(magnitude) + 16384.0f);
    return e4m3(sign | (sum - 0x46800000));
  }
  // Drop 20 of 23 mantissa bits to nearest even; a carry moves the exponent, as it must. Rebias from 127 to 7.
  uint32_t rounded = magnitude + 0x7ffff + ((magnitude >> 20) & 1);
  uint32_t code = (rounded >> 20) - ((127 - 7) << 3);
  return e4m3(sign | (code > 0x7e ? 0x7e : code));
}

// Converts two at once, the first into the low byte: one instruction from sm_89 on.
__host__ __device__ __forceinline__ uint16_t to_e4m3x2(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(second), "f"(first));
  return packed;
#else
  return uint16_t(to_e4m3_portable(first) | (uint32_t(to_e4m3_portable(second)) << 8));
#endif
}

// Returns the value of a code, exactly.
__host__ __device__ __forceinline__ float from_e4m3(e4m3 code) {
  const uint32_t magnitude = code & 0x7f, sign = uint32_t(code & 0x80) << 24;
  if (magnitude == 0x7f) return bits_float(0x7fffffff);
  // As float bits the code's exponent is 120 too small; the product with 2^120 corrects that, subnormals included.
  return bits_float(float_bits(bits_float(magnitude << 20) * bits_float((127 + 120) << 23)) | sign);
}

// Returns |x| as an integer. Integers have the order of magnitudes, with infinity and then NaN above everything finite,
// so that a maximum cannot lose a NaN.
__host__ __device__ __forceinline__ uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffff; }

// Divides by a format's largest number, rounded as IEEE's division: the product with the reciprocal, a constant,
// corrected once by the remainder. tests/emulation/checks.cpp tries every mantissa.
__host__ __device__ __forceinline__ float divided_by_max(float x, float max) {
  const float reciprocal = 1.0f / max, quotient = x * reciprocal;
  return fmaf(fmaf(-quotient, max, x), reciprocal, quotient);
}

// Returns the scale of a tile with this largest magnitude, by the rules of ops/fp8/encoding.py; `max` is the format's
// largest number.
__host__ __device__ __forceinline__ float tile_scale(uint32_t magnitude, bool power_of_two, float max = kE4M3Max) {
  if (magnitude == 0) return 1.0f;
  if (magnitude >= 0x7f800000) return bits_float(0x7fffffff);  // the tile is lost
  const float smallest = bits_float(1u << 23);                // 2^-126
  float scale = divided_by_max(bits_float(magnitude), max);
  if (scale < smallest) scale = smallest;
  return power_of_two ? bits_float((float_bits(scale) + 0x7fffff) & 0x7f800000) : scale;
}

struct alignas(16) Words4 {
  uint32_t word[4];
};

__device__ __forceinline__ Words4 load16(const void* address) {
#ifdef MEGATRON_DEEPSEEK_EMULATED
  return *static_cast<const Words4*>(emulation::aligned(address, 16));
#else
  uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
#endif
}

__device__ __forceinline__ void store16(void* address, const Words4& v) {
#ifdef MEGATRON_DEEPSEEK_EMULATED
  *static_cast<Words4*>(emulation::aligned(address, 16)) = v;
#else
  *static_cast<uint4*>(address) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
#endif
}

constexpr int kVector = 8;  // bfloat16 numbers in 16 bytes

__device__ __forceinline__ void unpack(const Words4& v, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = bits_float(v.word[i] << 16);
    x[2 * i + 1] = bits_float(v.word[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return to_bf16(low) | (uint32_t(to_bf16(high)) << 16);
#endif
}

__device__ __forceinline__ Words4 pack(const float (&x)[kVector]) {
  Words4 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = pack_bf16x2(x[2 * i], x[2 * i + 1]);
  return v;
}

struct alignas(8) Words2 {
  uint32_t word[2];
};

// Divides many x by one scale, rounded as IEEE's division: from the reciprocal, corrected twice by the remainder
// (Markstein 1990), in 7 operations where a division takes about 12 and a branch.
//
// The remainder is exact unless it underflows, which takes a quotient below 2^-12, a code of 0 either way, or a
// scale below 2^-80: then x and scale are both multiplied by 2^80 first, exactly. A NaN or an infinity stays a NaN or
// is a tile whose scale is NaN already.
struct Divider {
  float scale, reciprocal, lift;

  __host__ __device__ __forceinline__ explicit Divider(float tile_scale) {
    lift = tile_scale < 0x1p-80f ? 0x1p80f : 1.0f;
    scale = tile_scale * lift;
    reciprocal = 1.0f / scale;
  }
  __host__ __device__ __forceinline__ float operator()(float x) const {
    const float dividend = x * lift;
    float quotient = dividend * reciprocal;
    quotient = fmaf(fmaf(-quotient, scale, dividend), reciprocal, quotient);
    return copysignf(fmaf(fmaf(-quotient, scale, dividend), reciprocal, quotient), x);  // -0 would have become 0
  }
};

// Divides by a power of two, exactly: one product with its reciprocal. A NaN of a lost tile stays one.
struct PowerOfTwoDivider {
  float reciprocal;

  __host__ __device__ __forceinline__ explicit PowerOfTwoDivider(float tile_scale)
      : reciprocal(tile_scale == tile_scale ? bits_float((254u << 23) - float_bits(tile_scale)) : tile_scale) {}
  __host__ __device__ __forceinline__ float operator()(float x) const { return x * reciprocal; }
};

// Returns the eight codes of x / scale.
template <typename Division>
__device__ __forceinline__ Words2 encode8(const float (&x)[kVector], const Division& divide) {
  Words2 v;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    v.word[i] = to_e4m3x2(divide(x[4 * i]), divide(x[4 * i + 1])) |
                (uint32_t(to_e4m3x2(divide(x[4 * i + 2]), divide(x[4 * i + 3]))) << 16);
  return v;
}

// Returns the E5M6 code of |x| <= 65024: sign, 5 of exponent (bias 15), 6 of mantissa; rounded to nearest even.
__host__ __device__ __forceinline__ uint32_t to_e5m6(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 31 << 11, magnitude = bits & 0x7fffffff;
  // Below 2^-14 numbers are whole multiples of 2^-20, which the addition of 8 leaves in the last bits.
  if (magnitude < 0x38800000) return sign | (float_bits(bits_float(magnitude) + 8.0f) - 0x41000000);
  const uint32_t rounded = magnitude + 0xffff + ((magnitude >> 17) & 1);  // drops 17 of 23 mantissa bits
  return sign | ((rounded >> 17) - ((127 - 15) << 6));
}

// Returns the value of a finite code, exactly: as float bits its exponent is 112 too small.
__host__ __device__ __forceinline__ float from_e5m6(uint32_t code) {
  return bits_float(float_bits(bits_float((code & 0x7ff) << 17) * 0x1p112f) | code >> 11 << 31);
}

// The place of the three words of a row's 8 numbers from `column` on.
__device__ __forceinline__ int64_t e5m6_word(int64_t row, int column, int columns) {
  return (row * columns + column) / 8 * 3;
}

// Stores eight codes of x / scale, a power of two, as a stream of 12 bits each; of a lost tile they are NaN.
__device__ __forceinline__ void store_e5m6(uint32_t* words, const float (&x)[kVector], float scale) {
  const float reciprocal = bits_float((254u << 23) - float_bits(scale));  // exact, of 2^-126 .. 2^112
  uint32_t code[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) code[i] = scale == scale ? to_e5m6(x[i] * reciprocal) : 0x7e0;
  words[0] = code[0] | code[1] << 12 | code[2] << 24;
  words[1] = code[2] >> 8 | code[3] << 4 | code[4] << 16 | code[5] << 28;
  words[2] = code[5] >> 4 | code[6] << 8 | code[7] << 20;
}

// Loads the numbers that eight codes and a scale stand for. (Codes of a lost tile become NaN by their scale.)
__device__ __forceinline__ void load_e5m6(const uint32_t* words, float scale, float (&x)[kVector]) {
  const uint32_t a = words[0], b = words[1], c = words[2];
  const uint32_t code[kVector] = {a & 0xfff,         a >> 12 & 0xfff, (a >> 24 | b << 8) & 0xfff, b >> 4 & 0xfff,
                                  b >> 16 & 0xfff,   (b >> 28 | c << 4) & 0xfff, c >> 8 & 0xfff, c >> 20};
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = from_e5m6(code[i]) * scale;
}

__device__ __forceinline__ Words2 encode8(const float (&x)[kVector], float scale, bool power_of_two) {
  return power_of_two ? encode8(x, PowerOfTwoDivider(scale)) : encode8(x, Divider(scale));
}

__device__ __forceinline__ uint32_t largest_magnitude(const float (&x)[kVector]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t bits = magnitude_bits(x[i]);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

__device__ __forceinline__ void load8(const bf16* address, float (&x)[kVector]) { unpack(load16(address), x); }
__device__ __forceinline__ void store8(bf16* address, const float (&x)[kVector]) { store16(address, pack(x)); }

__device__ __forceinline__ void load8(const float* address, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Words4 v = load16(address + 4 * i);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[4 * i + j] = bits_float(v.word[j]);
  }
}

__device__ __forceinline__ void store8(float* address, const float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    store16(address + 4 * i, Words4{{float_bits(x[4 * i]), float_bits(x[4 * i + 1]), float_bits(x[4 * i + 2]),
                                     float_bits(x[4 * i + 3])}});
}

__device__ __forceinline__ float as_float(bf16 x) { return to_float(x); }
__device__ __forceinline__ float as_float(float x) { return x; }

}  // namespace mds
