// Matrices of experts and the rows that go through them.
#pragma once

#include <stdexcept>
#include <vector>

#include "bindings.h"

namespace hasten {

// The same matrix of several experts: equal shapes and types, checked once, at load.
class TensorList {
  public:
    explicit TensorList(nb::list tensors) : tensors_(tensors) {
        for (nb::handle object : tensors) {
            Tensor tensor("an expert's weight", object);
            tensor.contiguous();
            std::vector<int64_t> shape;
            for (int i = 0; i < tensor.ndim(); i++) shape.push_back(tensor.shape(i));
            if (data_.empty()) type_ = tensor.type(), shape_ = shape;
            if (tensor.type() != type_ || shape != shape_)
                tensor.fail("has another shape or type than the first one's");
            data_.push_back(tensor.as<void>());
        }
    }

    int64_t count() const { return int64_t(data_.size()); }
    Type type() const { return type_; }
    const std::vector<int64_t>& shape() const { return shape_; }
    const void* const* data() const { return data_.data(); }

  private:
    nb::list tensors_;  // keeps them alive
    std::vector<const void*> data_;
    Type type_ = Type::other;
    std::vector<int64_t> shape_;
};

// Rows grouped by expert: those of expert e are [offset[e], offset[e + 1]). Shapes are checked when
// this is made, what the offsets say when the parts are.
struct ExpertRows {
    const void* const* weights;
    const float* x;
    float* out;
    const int64_t* offset;
    int64_t count, rows, x_stride, out_stride;

    ExpertRows(nb::handle x_, const TensorList& list, int64_t inputs, nb::handle offsets_,
               int64_t outputs, nb::handle out_)
        : weights(list.data()), count(list.count()) {
        Tensor in("x", x_), to("out", out_), offsets("offsets", offsets_);
        in.is(Type::f32).has_shape({-1, inputs}).contiguous(1);
        to.is(Type::f32).has_shape({in.shape(0), outputs}).contiguous(1);
        offsets.is(Type::i64).has_shape({count + 1}).contiguous();
        x = in.floats(), out = to.floats(), offset = offsets.as<int64_t>();
        rows = in.shape(0), x_stride = in.stride(0), out_stride = to.stride(0);
    }

    // how many experts may have rows
    int64_t most_weights() const { return rows < count ? rows : count; }

    std::vector<LinearPart> parts() const {
        if (offset[0] != 0 || offset[count] != rows)
            throw std::invalid_argument("offsets do not begin at 0 and end at the number of rows");
        std::vector<LinearPart> parts;
        for (int64_t e = 0; e < count; e++) {
            if (offset[e + 1] < offset[e]) throw std::invalid_argument("offsets do not ascend");
            if (offset[e + 1] > offset[e])
                parts.push_back({x + offset[e] * x_stride, offset[e + 1] - offset[e], weights[e],
                                 nullptr, nullptr, out + offset[e] * out_stride});
        }
        return parts;
    }
};

}  // namespace hasten
