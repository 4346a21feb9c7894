// Moving a thread's channels: conversions, accesses of up to 16 bytes, asynchronous copies, and
// lines of state in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../line_scan.h"

namespace cgspn_seg {

// V consecutive channels to compute with.
template <typename A, int V>
struct Channels {
  A values[V];

  __device__ A& operator[](int v) { return values[v]; }
  __device__ const A& operator[](int v) const { return values[v]; }
};

// V consecutive channels as they are stored, in the words that one instruction moves.
template <typename T, int V>
struct Stored {
  static constexpr int kBytes = sizeof(T) * V;
  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;
  static_assert(kBytes <= 16, "an instruction moves up to 16 bytes");

  unsigned words[kWords];

  __device__ T get(int v) const {
    if constexpr (sizeof(T) == 2) {
      const auto half = static_cast<unsigned short>(v & 1 ? words[v / 2] >> 16 : words[v / 2]);
      return reinterpret_cast<const T&>(half);
    } else {
      return reinterpret_cast<const T*>(words)[v];
    }
  }
};

template <typename T, int V>
__device__ Channels<Accumulator<T>, V> widen(const Stored<T, V>& stored) {
  Channels<Accumulator<T>, V> channels;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float
      const unsigned word = stored.words[v / 2];
      channels[v] = __uint_as_float(v & 1 ? word & 0xffff0000u : word << 16);
    } else {
      channels[v] = static_cast<Accumulator<T>>(stored.get(v));
    }
  }
  return channels;
}

template <typename T, int V>
__device__ Stored<T, V> narrow(const Channels<Accumulator<T>, V>& channels) {
  union {
    Stored<T, V> stored;
    T values[V];
  } result{};
#pragma unroll
  for (int v = 0; v < V; ++v) result.values[v] = static_cast<T>(channels[v]);
  return result.stored;
}

template <typename T, int V>
__device__ void store(T* target, const Channels<Accumulator<T>, V>& channels) {
  const auto stored = narrow<T, V>(channels);
  [[maybe_unused]] const auto& words = stored.words;
  if constexpr (sizeof(T) * V == 16) {
    *reinterpret_cast<uint4*>(target) = {words[0], words[1], words[2], words[3]};
  } else if constexpr (sizeof(T) * V == 8) {
    *reinterpret_cast<uint2*>(target) = {words[0], words[1]};
  } else if constexpr (sizeof(T) * V == 4) {
    *reinterpret_cast<unsigned*>(target) = words[0];
  } else {
    *target = stored.get(0);
  }
}

template <typename T, int V>
__device__ Channels<Accumulator<T>, V> load(const T* source) {
  if constexpr (sizeof(T) * V == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(source);
    return widen(Stored<T, V>{words.x, words.y, words.z, words.w});
  } else {
    static_assert(V == 1, "16 bytes, or one channel");
    return {{static_cast<Accumulator<T>>(*source)}};
  }
}

// Shared memory is addressed as the instructions do, in bytes from its beginning: pointers would be
// converted at every access.
using SharedAddress = unsigned;

__device__ inline SharedAddress shared_memory() {
  extern __shared__ __align__(16) char memory[];
  SharedAddress address;
  // Opaque, so that it stays in a register.
  asm volatile("mov.u32 %0, %1;"
               : "=r"(address)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(memory))));
  return address;
}

template <typename T, int V>
__device__ Stored<T, V> load_shared(SharedAddress source) {
  Stored<T, V> stored;
  auto& words = stored.words;
  if constexpr (sizeof(T) * V == 16) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(source)
                 : "memory");
  } else if constexpr (sizeof(T) * V == 8) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(source)
                 : "memory");
  } else if constexpr (sizeof(T) * V == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(source) : "memory");
  } else {
    asm volatile("{ .reg .u16 half; ld.shared.u16 half, [%1]; cvt.u32.u16 %0, half; }"
                 : "=r"(words[0])
                 : "r"(source)
                 : "memory");
  }
  return stored;
}

template <typename T, int V>
__device__ void store_shared(SharedAddress target, const Stored<T, V>& stored) {
  const auto& words = stored.words;
  if constexpr (sizeof(T) * V == 16) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  } else if constexpr (sizeof(T) * V == 8) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(target), "r"(words[0]), "r"(words[1])
                 : "memory");
  } else {
    static_assert(sizeof(T) * V == 4, "state is float or double");
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(target), "r"(words[0]) : "memory");
  }
}

// Starts copying V channels to shared memory, and fetches the rest of their 128 bytes into the
// second-level cache. At least four bytes move: two come with the aligned word they lie in, which
// is readable, but not the tensor's own where they are its `last`; checkers of memory object.
template <int V, typename T>
__device__ void copy_async(SharedAddress target, const T* source, const T* last) {
  if constexpr (sizeof(T) * V == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(target), "l"(source)
                 : "memory");
  } else if constexpr (sizeof(T) * V == 2) {
    const auto address = reinterpret_cast<uintptr_t>(source);
    if (source == last && address % 4 == 0) {
      const unsigned short half = *reinterpret_cast<const unsigned short*>(source);
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(target), "h"(half) : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 4;" ::"r"(target),
                   "l"(address & ~uintptr_t{2})
                   : "memory");
    }
  } else {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2;" ::"r"(target), "l"(source),
                 "n"(sizeof(T) * V)
                 : "memory");
  }
}

// The V channels that copy_async brought from `source`.
template <int V, typename T>
__device__ Stored<T, V> copied(SharedAddress target, const T* source) {
  if constexpr (sizeof(T) * V == 2)
    target += static_cast<unsigned>(reinterpret_cast<uintptr_t>(source)) & 2;
  return load_shared<T, V>(target);
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// V channels of a thread in a line of state in shared memory. They lie in planes of 16 bytes a
// thread, `plane_bytes` apart: so no two threads of a quarter warp meet in one bank.
template <typename A, int V>
struct State {
  static constexpr int kBytes = V * sizeof(A);
  static constexpr int kChunk = kBytes > 16 ? 16 / sizeof(A) : V;
  static constexpr int kChunkBytes = kChunk * sizeof(A);
  static constexpr int kPlanes = V / kChunk;

  __device__ static Channels<A, V> get(SharedAddress address, int plane_bytes) {
    Channels<A, V> channels;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const auto part = widen<A, kChunk>(load_shared<A, kChunk>(address + plane * plane_bytes));
#pragma unroll
      for (int v = 0; v < kChunk; ++v) channels[plane * kChunk + v] = part[v];
    }
    return channels;
  }
  __device__ static Stored<A, kChunk> part(const Channels<A, V>& channels, int plane) {
    Channels<A, kChunk> values;
#pragma unroll
    for (int v = 0; v < kChunk; ++v) values[v] = channels[plane * kChunk + v];
    return narrow<A, kChunk>(values);
  }
  __device__ static void set(SharedAddress address, int plane_bytes,
                             const Channels<A, V>& channels) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane)
      store_shared<A, kChunk>(address + plane * plane_bytes, part(channels, plane));
  }
};

// Fills shared memory with zeros, four bytes at a time.
__device__ inline void clear_shared(SharedAddress memory, int bytes) {
  for (int i = 4 * threadIdx.x; i < bytes; i += 4 * blockDim.x)
    store_shared<float, 1>(memory + i, {{0}});
}

}  // namespace cgspn_seg
