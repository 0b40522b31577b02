// Each of these runs every case of its kernels on one table.
#pragma once

#include "kernels/kernel_table.h"

void test_products(const nplora::kernels::KernelTable& table);
void test_lanes(const nplora::kernels::KernelTable& table);
void test_elementwise(const nplora::kernels::KernelTable& table);
void test_conversions(const nplora::kernels::KernelTable& table);

// The choice of the table itself, and NPLORA_ISA.
void test_dispatch();
