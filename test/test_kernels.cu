/*
Every kernel against oracle.h, forward and backward, in the precision of the build. Each module's
cases stand in cases_<module>.h, with their tolerances and where those come from.

    test_kernels [part of a module's name] [--verbose]      from the root of the repository

Runs on the host layer and, built with nvcc, on a GPU; without one everything is skipped.
*/
#include "../llmc/device.cuh"
#include "test.h"
#include "oracle.h"
#include "cases_ptx.h"
#include "cases_matmul.h"
#include "cases_embedding.h"
#include "cases_rmsnorm.h"
#include "cases_rotary.h"
#include "cases_attention.h"
#include "cases_relu2.h"
#include "cases_mix.h"
#include "cases_gate.h"
#include "cases_loss.h"
#include "cases_fp8.h"
#include "cases_optimizer.h"
#include "cases_adamw.h"
#include "cases_normuon.h"
#include "cases_cast.h"

int main(int argc, char** argv) {
    program_name = "test_kernels";
    test_init(argc, argv);
    if (!test_has_device()) return test_summary();
    if (test_group("ptx")) test_ptx();
    if (test_group("matmul")) test_matmul();
    if (test_group("embedding")) test_embedding();
    if (test_group("rmsnorm")) test_rmsnorm();
    if (test_group("rotary")) test_rotary();
    if (test_group("attention")) test_attention();
    if (test_group("relu2")) test_relu2();
    if (test_group("mix")) test_mix();
    if (test_group("gate")) test_gate();
    if (test_group("loss")) test_loss();
    if (test_group("fp8")) test_fp8();
    if (test_group("optimizer")) test_optimizer();
    if (test_group("adamw")) test_adamw();
    if (test_group("normuon")) test_normuon();
    if (test_group("cast")) test_cast();
    return test_summary();
}
