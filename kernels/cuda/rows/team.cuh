// Threads that share a row, a warp or the whole block as the width of the row needs it: chosen at run time,
// so that one kernel serves rows of all widths.
#pragma once

#include "cuda/rows/group.cuh"

namespace mfd {
namespace device {

struct Team {
  typedef ThreadBlock::Shared Shared;
  Shared* shared;
  bool whole;  // the block

  MFD_DEVICE Team(Shared* s, bool whole_block) : shared(s), whole(whole_block) {}
  MFD_DEVICE int rank() const { return whole ? ThreadBlock::rank() : Warp::rank(); }
  MFD_DEVICE int threads() const { return whole ? ThreadBlock::threads() : Warp::threads(); }
  MFD_DEVICE int in_block() const { return whole ? 1 : Warp::in_block(); }
  MFD_DEVICE int index_in_block() const { return whole ? 0 : Warp::index_in_block(); }
  MFD_DEVICE void sync() const {
    if (whole) {
      ThreadBlock::sync();
    } else {
      Warp::sync();
    }
  }

  template <class Op, int K>
  MFD_DEVICE void reduce(double (&values)[K]) const {
    if (whole) {
      ThreadBlock(shared).template reduce<Op>(values);
    } else {
      Warp(nullptr).template reduce<Op>(values);
    }
  }
};

}  // namespace device
}  // namespace mfd
