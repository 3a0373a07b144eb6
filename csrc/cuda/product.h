// torch's product of two matrices (cuBLAS on a card) that are parts of tensors.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <stdexcept>
#include <utility>

#include "../tensors.h"

namespace nf4lora::cuda {

// [rows, columns]: a view of a tensor's memory, whose value (r, c) is offset + r * row_stride + c * column_stride values
// behind the tensor's first.
class Matrix {
 public:
  Matrix(const Tensor& tensor, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride = 1,
         int64_t offset = 0) {
    const std::array<int64_t, 2> sizes = {rows, columns}, strides = {row_stride, column_stride};
    view(tensor, 2, sizes.data(), strides.data(), offset);
  }
  // [columns], as a bias is.
  Matrix(const Tensor& tensor, int64_t columns, int64_t offset) {
    const int64_t one = 1;
    view(tensor, 1, &columns, &one, offset);
  }
  AtenTensorHandle handle() const { return view_.get(); }
  bool is_on_cpu() const { return view_.is_cpu(); }

 private:
  void view(const Tensor& tensor, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset) {
    AtenTensorHandle made = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), dim, sizes, strides, offset, &made));
    view_ = Tensor(made);
  }
  Tensor view_;
};

// out = beta * self + alpha * left right, all of one dtype. self is out, or a bias [columns of out]; with beta = 0 it is
// not read.
inline void add_product(const Matrix& out, double beta, const Matrix& self, const Matrix& left, const Matrix& right,
                        double alpha = 1.0) {
  using AddProduct = int32_t (*)(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle left,
                                 AtenTensorHandle right, double beta, double alpha);
  // Looked up in the library that torch has loaded, as the stream is (stream.h).
  static const AddProduct on_card = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<AddProduct>(dlsym(library, "aoti_torch_cuda_addmm_out")) : nullptr;
  }();
  const AddProduct product = out.is_on_cpu() ? &aoti_torch_cpu_addmm_out : on_card;  // the first one in tests
  if (!product)
    throw std::runtime_error("nf4lora: torch must multiply on CUDA, got a build that does not; reinstall torch");
  if (product(out.handle(), self.handle(), left.handle(), right.handle(), beta, alpha) != 0) {
    throw std::runtime_error("nf4lora: torch's product of two matrices failed" + what_torch_says());
  }
}

}  // namespace nf4lora::cuda
