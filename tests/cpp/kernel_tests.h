// Each of these runs every case of its kernels on one table.
#pragma once

#include <cstring>

#include "kernels/kernel_table.h"

// Every instruction set but the generic one rounds once a step.
inline bool fuses(const nplora::kernels::KernelTable& table) {
  return std::strcmp(table.isa, "generic") != 0;
}

void test_products(const nplora::kernels::KernelTable& table);
void test_dots(const nplora::kernels::KernelTable& table);
void test_lanes(const nplora::kernels::KernelTable& table);
void test_elementwise(const nplora::kernels::KernelTable& table);
void test_conversions(const nplora::kernels::KernelTable& table);

// The choice of the table itself, and NPLORA_ISA.
void test_dispatch();
