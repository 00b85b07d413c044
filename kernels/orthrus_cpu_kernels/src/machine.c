// What an object was compiled for, and whether this machine has it.
#include "isa.h"
#include "orthrus_cpu.h"

#if defined(ORTHRUS_AVX2VNNI)
#include <cpuid.h>
static int has_avx_vnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#elif (defined(ORTHRUS_NEON) || defined(ORTHRUS_NEONI8MM)) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1 << 13)
#endif
#elif defined(ORTHRUS_NEONI8MM) && defined(__APPLE__)
#include <sys/sysctl.h>
static int has_i8mm(void) {
    int found = 0;
    size_t size = sizeof found;
    return !sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, 0, 0) && found;
}
#endif

const char *orthrus_isa(void) { return ISA_NAME; }

int orthrus_usable(void) {
#if defined(ORTHRUS_AVX512VNNI)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#elif defined(ORTHRUS_AVX2VNNI)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && has_avx_vnni();
#elif defined(ORTHRUS_AVX2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#elif defined(ORTHRUS_NEON) && defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(ORTHRUS_NEONI8MM) && defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) && (getauxval(AT_HWCAP2) & HWCAP2_I8MM);
#elif defined(ORTHRUS_NEONI8MM) && defined(__APPLE__)
    return has_i8mm();
#else
    return 1; // portable, or dot products on a Mac, all of which have them
#endif
}
