/* The layers of a decode step, one after another, without leaving C: RMSNorm, attention over the cache with rotary
   positions, RMSNorm, gated MLP. Each step is a kernel of another file; models/lean.py says when this is the layer. */
#include "common.h"

void rms_norm_bf16(const bf16 *x, const bf16 *w, bf16 *out, float *rstd, long rows, long d, float eps, float offset);
void rotary_bf16(const bf16 *x, const bf16 *cosine, const bf16 *sine, bf16 *out, long tokens, long heads, long d,
                 long x_token, long x_head, long out_token, long out_head, float sign);
void gated_bf16(const bf16 *gate, const bf16 *up, bf16 *out, long n, int kind);
void skinny_bf16(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *out, bf16 *packed, long m, long n, long k);
void trimtab_attend(const void *plan, const void *q, const void *k, const void *v, const int64_t *row_step, void *K,
                    void *V, void *out, float scale, float cap, int window, int is_bf16);

typedef struct {
  /* Weights, then biases, of q, k, v, o, gate, up, down; a bias may be null, and so may a norm of heads. */
  const bf16 *weight[7], *bias[7], *norm[2], *head_norm[2];
  /* Of a LoRA adapter [rank, in] and [out, rank], or null. */
  const bf16 *down[7], *up[7];
  void *keys, *values;
  double eps[2], head_eps[2], scale, lora_scale[7];
  int64_t window, rank[7];
} Layer;

typedef struct {
  int64_t width, heads, kv_heads, d, inner, kind, rank, widest; /* rank: the largest, 0 without adapters */
  double offset;
} Shape;

static void add(bf16 *x, const bf16 *more, long n) {
#pragma omp parallel for simd
  for (long i = 0; i < n; i++) x[i] = narrow(widen(x[i]) + widen(more[i]));
}

typedef struct {
  long rows;
  bf16 *packed, *low, *more;
} Room;

/* Linear layer `part`, rounded where a module and its adapter's modules round. */
static void linear(const Layer *l, int part, const bf16 *x, bf16 *out, const Room *room, long n, long k) {
  skinny_bf16(x, l->weight[part], l->bias[part], out, room->packed, room->rows, n, k);
  if (!l->down[part]) return;
  skinny_bf16(x, l->down[part], NULL, room->low, room->packed, room->rows, l->rank[part], k);
  skinny_bf16(room->low, l->up[part], NULL, room->more, room->packed, room->rows, n, l->rank[part]);
  float scale = l->lora_scale[part];
#pragma omp parallel for simd
  for (long i = 0; i < room->rows * n; i++)
    out[i] = narrow(widen(out[i]) + widen(narrow(widen(room->more[i]) * scale)));
}

/* hidden [rows, width] in place. room: rows · (width + 2·heads·d + 2·kv_heads·d + 2·inner) numbers, with adapters
   rows · (the largest rank + the largest width) more, then what skinny_bf16 wants for its packed rows; rstd:
   rows · heads floats. */
void trimtab_stack(const Layer *layers, long count, const Shape *s, const void *plan, long rows, bf16 *hidden,
                   const bf16 *cosine, const bf16 *sine, bf16 *room, float *rstd) {
  long q_width = s->heads * s->d, kv_width = s->kv_heads * s->d;
  bf16 *x = room, *q = x + rows * s->width, *out = q + rows * q_width, *k = out + rows * q_width;
  bf16 *v = k + rows * kv_width, *gate = v + rows * kv_width, *up = gate + rows * s->inner;
  bf16 *low = up + rows * s->inner, *more = low + rows * s->rank;
  Room place = {rows, more + (s->rank ? rows * s->widest : 0), low, more};
  int64_t step[3] = {q_width, kv_width, kv_width};
  for (const Layer *l = layers; l < layers + count; l++) {
    rms_norm_bf16(hidden, l->norm[0], x, rstd, rows, s->width, l->eps[0], s->offset);
    linear(l, 0, x, q, &place, q_width, s->width);
    linear(l, 1, x, k, &place, kv_width, s->width);
    linear(l, 2, x, v, &place, kv_width, s->width);
    if (l->head_norm[0]) rms_norm_bf16(q, l->head_norm[0], q, rstd, rows * s->heads, s->d, l->head_eps[0], s->offset);
    if (l->head_norm[1])
      rms_norm_bf16(k, l->head_norm[1], k, rstd, rows * s->kv_heads, s->d, l->head_eps[1], s->offset);
    rotary_bf16(q, cosine, sine, q, rows, s->heads, s->d, q_width, s->d, q_width, s->d, 1.0f);
    rotary_bf16(k, cosine, sine, k, rows, s->kv_heads, s->d, kv_width, s->d, kv_width, s->d, 1.0f);
    trimtab_attend(plan, q, k, v, step, l->keys, l->values, out, l->scale, 0.0f, l->window, 1);
    linear(l, 3, out, x, &place, s->width, q_width);
    add(hidden, x, rows * s->width);
    rms_norm_bf16(hidden, l->norm[1], x, rstd, rows, s->width, l->eps[1], s->offset);
    linear(l, 4, x, gate, &place, s->inner, s->width);
    linear(l, 5, x, up, &place, s->inner, s->width);
    gated_bf16(gate, up, gate, rows * s->inner, s->kind);
    linear(l, 6, gate, x, &place, s->width, s->inner);
    add(hidden, x, rows * s->width);
  }
}
