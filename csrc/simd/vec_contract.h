// What simd/vec_<isa>.h must offer, as far as a compiler can check it. CONTRACTS.md says what each of them does.
#pragma once

#include <concepts>
#include <cstdint>

namespace {

template <class V>
concept IsVec16 = requires(V a, V (&rows)[16], const V (&some)[8], const float* from, float* to, int64_t stride, int n,
                           uint32_t kept, const uint8_t* bytes) {
  { V::kIsa } -> std::convertible_to<const char*>;
  requires sizeof(V) == 16 * sizeof(float);
  // Sizes of the register tiles of the three loops.
  requires V::kTilePixels >= 2 && V::kInputEntries >= 1 && V::kInputVectors >= 1;
  requires V::kValueEntries >= 1 && V::kValuePixels >= 1;
  // Memory.
  { V::zero() } -> std::same_as<V>;
  { V::broadcast(from) } -> std::same_as<V>;
  { V::load(from) } -> std::same_as<V>;
  { V::load_first(from, n) } -> std::same_as<V>;
  { V::load_strided(from, stride, n) } -> std::same_as<V>;
  { a.store(to) } -> std::same_as<void>;
  { a.store_first(to, n) } -> std::same_as<void>;
  { a.stream(to) } -> std::same_as<void>;
  { V::fence() } -> std::same_as<void>;
  // Arithmetic of lanes.
  { V::fma(a, a, a) } -> std::same_as<V>;
  { V::add(a, a) } -> std::same_as<V>;
  { V::sub(a, a) } -> std::same_as<V>;
  { V::mul(a, a) } -> std::same_as<V>;
  { V::div(a, a) } -> std::same_as<V>;
  { V::max(a, a) } -> std::same_as<V>;
  { V::max_nan(a, a) } -> std::same_as<V>;
  { V::min(a, a) } -> std::same_as<V>;
  { V::where_positive(a, a) } -> std::same_as<V>;
  { V::pow2(a) } -> std::same_as<V>;
  // Between lanes.
  { V::expand_load(from, kept) } -> std::same_as<V>;
  { V::compress(a, kept) } -> std::same_as<V>;
  { V::transpose(rows) } -> std::same_as<void>;
  { V::sum_rows(rows) } -> std::same_as<V>;
  { V::store_transposed8(some, to, stride, n, n) } -> std::same_as<void>;
  // Of bytes.
  { V::sum_first_bytes(bytes, n) } -> std::same_as<int64_t>;
};

static_assert(IsVec16<Vec16>, "include a simd/vec_<isa>.h first; CONTRACTS.md says what it must offer");

}  // namespace
