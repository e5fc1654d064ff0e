// Whole rows of matrices in and out of the compute dtype.

template <class S>
MFD_INLINE bool is_compute(Dtype dtype) {
  return dtype == (sizeof(typename S::T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32);
}

MFD_INLINE const char* row_address(const Matrix& m, int64_t row) {
  const int64_t offset =
      row < m.inner ? row * m.row_stride : (row / m.inner) * m.outer_stride + (row % m.inner) * m.row_stride;
  return static_cast<const char*>(m.data) + offset * dtype_size(m.dtype);
}

// The row where it lies, or converted into `buffer`.
template <class S>
MFD_INLINE const typename S::T* row_in(const Matrix& m, int64_t row, int64_t n, typename S::T* buffer) {
  const char* raw = row_address(m, row);
  if (is_compute<S>(m.dtype)) return reinterpret_cast<const typename S::T*>(raw);
  convert_in(raw, m.dtype, n, buffer);
  return buffer;
}

// Where to compute a row that goes to `out`: there, or in `buffer` on its way.
template <class S>
MFD_INLINE typename S::T* row_target(Dtype dtype, bool stream, char* out, typename S::T* buffer) {
  return is_compute<S>(dtype) && !stream ? reinterpret_cast<typename S::T*>(out) : buffer;
}

template <class S>
MFD_INLINE void row_out(const typename S::T* in, int64_t n, Dtype dtype, bool stream, char* out) {
  if (reinterpret_cast<const char*>(in) == out) return;
  for (int64_t i = 0; i < n; i += kBlock)
    convert_out(in + i, n - i < kBlock ? n - i : kBlock, dtype, stream, out + i * dtype_size(dtype));
}

// Vectors of which `left` >= 1 elements exist; the others are 0.
template <class S>
MFD_INLINE typename S::V load_upto(const typename S::T* p, int64_t left) {
  return left >= S::kWidth ? S::load(p) : S::load_first(p, left, typename S::T(0));
}

template <class S>
MFD_INLINE void store_upto(typename S::T* p, typename S::V v, int64_t left) {
  left >= S::kWidth ? S::store(p, v) : S::store_first(p, v, left);
}
