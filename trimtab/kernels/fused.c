/* The elementwise parts of a training step, each in one pass over memory. The bodies are in fused.h, which is
   read twice: for float and for bf16. All arithmetic is fp32; a result is rounded once, when it is stored.
   Shapes are row-major; what each function computes is written in the Python files beside its plain form. */
#include "common.h"
#include <omp.h>

#define T float
#define LOAD(x) (x)
#define STORE(x) (x)
#define NAME(f) f##_f32
#include "fused.h"
#undef T
#undef LOAD
#undef STORE
#undef NAME

#define T bf16
#define LOAD(x) widen(x)
#define STORE(x) narrow(x)
#define NAME(f) f##_bf16
#include "fused.h"
