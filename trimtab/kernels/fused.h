/* Included by fused.c with T, LOAD, STORE and NAME defined. */

void NAME(rms_norm)(const T *x, const T *w, T *out, float *rstd, long rows, long d, float eps, float offset) {
#pragma omp parallel for
  for (long r = 0; r < rows; r++) {
    const T *xr = x + r * d;
    T *o = out + r * d;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < d; i++) sum += LOAD(xr[i]) * LOAD(xr[i]);
    float scale = 1.0f / sqrtf(sum / d + eps);
    rstd[r] = scale;
#pragma omp simd
    for (long i = 0; i < d; i++) o[i] = STORE(LOAD(xr[i]) * scale * (LOAD(w[i]) + offset));
  }
}

/* grad_w: float [threads, d], zeroed by the caller, one row a thread; the caller adds them up. */
void NAME(rms_norm_backward)(const T *grad, const T *x, const T *w, const float *rstd, T *grad_x, float *grad_w,
                             long rows, long d, float offset) {
#pragma omp parallel
  {
    float *gw = grad_w + omp_get_thread_num() * d;
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
      const T *g = grad + r * d, *xr = x + r * d;
      T *gx = grad_x + r * d;
      float scale = rstd[r], dot = 0;
#pragma omp simd reduction(+ : dot)
      for (long i = 0; i < d; i++) dot += LOAD(g[i]) * (LOAD(w[i]) + offset) * LOAD(xr[i]);
      dot *= scale * scale / d;
#pragma omp simd
      for (long i = 0; i < d; i++) {
        float gi = LOAD(g[i]), xi = LOAD(xr[i]);
        gw[i] += gi * xi * scale;
        gx[i] = STORE(scale * (gi * (LOAD(w[i]) + offset) - dot * xi));
      }
    }
  }
}

static inline float NAME(sigmoid)(float z) {
  return 1.0f / (1.0f + fast_exp2(z < -87.0f ? 87.0f * LOG2E : z * -LOG2E));
}

/* kind 0: silu; 1: gelu, tanh form: x · sigmoid(2·sqrt(2/π)·(x + 0.044715·x³)). */
static inline float NAME(act)(float x, int kind) {
  return x * NAME(sigmoid)(kind ? 1.5957691216f * (x + 0.044715f * x * x * x) : x);
}

void NAME(gated)(const T *gate, const T *up, T *out, long n, int kind) {
#pragma omp parallel for simd
  for (long i = 0; i < n; i++) out[i] = STORE(NAME(act)(LOAD(gate[i]), kind) * LOAD(up[i]));
}

void NAME(gated_backward)(const T *grad, const T *gate, const T *up, T *grad_gate, T *grad_up, long n, int kind) {
#pragma omp parallel for simd
  for (long i = 0; i < n; i++) {
    float g = LOAD(grad[i]), x = LOAD(gate[i]), u = LOAD(up[i]), z = x, dz = 1.0f;
    if (kind) {
      z = 1.5957691216f * (x + 0.044715f * x * x * x);
      dz = 1.5957691216f * (1.0f + 0.134145f * x * x);
    }
    float s = NAME(sigmoid)(z), a = x * s;
    grad_gate[i] = STORE(g * u * (s + a * (1.0f - s) * dz));
    grad_up[i] = STORE(g * a);
  }
}

/* x [tokens, heads, d] by strides in elements, out likewise: out = x·cos + rotate_half(x)·sin with cos, sin
   [tokens, d]; sign −1 gives the transpose, which is the backward pass. */
void NAME(rotary)(const T *x, const T *cosine, const T *sine, T *out, long tokens, long heads, long d, long x_token,
                  long x_head, long out_token, long out_head, float sign) {
  long half = d / 2;
#pragma omp parallel for
  for (long t = 0; t < tokens; t++)
    for (long h = 0; h < heads; h++) {
      const T *xi = x + t * x_token + h * x_head, *c = cosine + t * d, *s = sine + t * d;
      T *o = out + t * out_token + h * out_head;
#pragma omp simd
      for (long i = 0; i < half; i++) {
        float a = LOAD(xi[i]), b = LOAD(xi[i + half]);
        float from_a = LOAD(s[i + half]), from_b = LOAD(s[i]);
        if (sign < 0) {
          o[i] = STORE(a * LOAD(c[i]) + b * from_a);
          o[i + half] = STORE(b * LOAD(c[i + half]) - a * from_b);
        } else {
          o[i] = STORE(a * LOAD(c[i]) - b * from_b);
          o[i + half] = STORE(b * LOAD(c[i + half]) + a * from_a);
        }
      }
    }
}

/* Keys [first, stop) that a query at this position sees: not after it, and nearer than the window. Loops run over
   [begin, end), the same widened to whole vectors, so that short rows are not worked off one by one. */
typedef struct {
  long first, stop, begin, end;
} NAME(range);

static inline NAME(range) NAME(seen)(long position, long keys, long window) {
  NAME(range) k;
  k.stop = position + 1 < keys ? position + 1 : keys;
  k.first = window > 0 && position + 1 > window ? position + 1 - window : 0;
  if (k.first > k.stop) k.first = k.stop;
  k.begin = k.first & ~31L;
  k.end = (k.stop + 31) & ~31L;
  if (k.end > keys) k.end = keys;
  return k;
}

/* scores [batch, rows, keys] → softmax(scale · scores) in place, over the keys that each row sees; row r stands at
   positions[r % period]. lse [batch, rows]; −inf and zeros where a row sees nothing. */
void NAME(softmax)(T *scores, float *lse, const int *positions, long batch, long rows, long keys, long period,
                   long window, float scale) {
#pragma omp parallel
  {
    float *e = malloc((keys + 32) * sizeof(float));
#pragma omp for
    for (long r = 0; r < batch * rows; r++) {
      T *s = scores + r * keys;
      NAME(range) k = NAME(seen)(positions[r % rows % period], keys, window);
      int first = k.first - k.begin, stop = k.stop - k.begin, n = k.end - k.begin;
      const T *from = s + k.begin;
      float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
      for (int i = 0; i < n; i++) {
        float v = (i >= first) & (i < stop) ? LOAD(from[i]) : -INFINITY;
        e[i] = v;
        top = v > top ? v : top;
      }
      float shift = first < stop ? top * scale : 0.0f, factor = scale * LOG2E, off = shift * LOG2E;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < n; i++) {
        float x = fast_exp2(e[i] * factor - off);
        e[i] = (i >= first) & (i < stop) ? x : 0.0f;
        sum += e[i];
      }
      lse[r] = first < stop ? shift + logf(sum) : -INFINITY;
      float inverse = first < stop ? 1.0f / sum : 0.0f;
      T *to = s + k.begin;
      memset(s, 0, k.begin * sizeof(T));
#pragma omp simd
      for (int i = 0; i < n; i++) to[i] = STORE(e[i] * inverse);
      memset(s + k.end, 0, (keys - k.end) * sizeof(T));
    }
    free(e);
  }
}

/* scores → probabilities exp(scale · scores − lse), grad → scale · p · (grad − delta), both in place. lse and delta are
   of the whole row of attention, of which these keys may be a part. */
void NAME(softmax_backward)(T *scores, T *grad, const float *lse, const float *delta, const int *positions, long batch,
                            long rows, long keys, long period, long window, float scale) {
#pragma omp parallel for
  for (long r = 0; r < batch * rows; r++) {
    T *s = scores + r * keys, *g = grad + r * keys;
    NAME(range) k = NAME(seen)(positions[r % rows % period], keys, window);
    int first = k.first - k.begin, stop = k.stop - k.begin, n = k.end - k.begin;
    float norm = lse[r] * LOG2E, mean = delta[r], factor = scale * LOG2E;
    memset(s, 0, k.begin * sizeof(T));
    memset(g, 0, k.begin * sizeof(T));
    T *p = s + k.begin, *d = g + k.begin;
#pragma omp simd
    for (int i = 0; i < n; i++) {
      float x = fast_exp2(LOAD(p[i]) * factor - norm);
      x = (i >= first) & (i < stop) ? x : 0.0f;
      p[i] = STORE(x);
      d[i] = STORE(scale * x * (LOAD(d[i]) - mean));
    }
    memset(s + k.end, 0, (keys - k.end) * sizeof(T));
    memset(g + k.end, 0, (keys - k.end) * sizeof(T));
  }
}

/* out, lse: the softmax-weighted values and log-sum-exp over some keys; more, more_lse: over further keys. Afterwards
   out and lse are those over both. [batch, rows, d], out by strides between batches in elements. */
void NAME(merge)(T *out, float *lse, const T *more, const float *more_lse, long batch, long rows, long d, long out_batch,
                 long lse_batch) {
#pragma omp parallel for collapse(2)
  for (long b = 0; b < batch; b++)
    for (long r = 0; r < rows; r++) {
      T *o = out + b * out_batch + r * d;
      const T *m = more + (b * rows + r) * d;
      float *l = lse + b * lse_batch + r, extra = more_lse[b * rows + r];
      if (extra == -INFINITY) continue;
      float top = *l > extra ? *l : extra, mine = expf(*l - top), theirs = expf(extra - top), sum = mine + theirs;
      *l = top + logf(sum);
      mine /= sum;
      theirs /= sum;
#pragma omp simd
      for (long i = 0; i < d; i++) o[i] = STORE(mine * LOAD(o[i]) + theirs * LOAD(m[i]));
    }
}

/* out[r] = Σ_i a[r, i] · b[r, i] */
void NAME(row_dot)(const T *a, const T *b, float *out, long rows, long d) {
#pragma omp parallel for
  for (long r = 0; r < rows; r++) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < d; i++) sum += LOAD(a[r * d + i]) * LOAD(b[r * d + i]);
    out[r] = sum;
  }
}

/* Log-probability of a target and entropy of softmax(logits / temperature), a row each; entropy may be null. */
void NAME(logps)(const T *logits, const int64_t *targets, float *logp, float *lse, float *entropy, long rows, long v,
                 float inverse_temperature) {
#pragma omp parallel for
  for (long r = 0; r < rows; r++) {
    const T *z = logits + r * v;
    float top = -INFINITY, sum = 0, moment = 0;
#pragma omp simd reduction(max : top)
    for (long i = 0; i < v; i++) {
      float x = LOAD(z[i]);
      top = x > top ? x : top;
    }
    top *= inverse_temperature;
    if (entropy) {
#pragma omp simd reduction(+ : sum, moment)
      for (long i = 0; i < v; i++) {
        float x = LOAD(z[i]) * inverse_temperature - top, e = fast_exp(x);
        sum += e;
        /* A forbidden token (−inf) has no mass: 0·(−inf) must be 0. */
        moment += e * (x > -87.0f ? x : -87.0f);
      }
      entropy[r] = logf(sum) - moment / sum;
    } else {
#pragma omp simd reduction(+ : sum)
      for (long i = 0; i < v; i++) sum += fast_exp(LOAD(z[i]) * inverse_temperature - top);
    }
    lse[r] = top + logf(sum);
    logp[r] = LOAD(z[targets[r]]) * inverse_temperature - lse[r];
  }
}

/* ∂/∂logits of grad·logp + grad_entropy·entropy; grad_entropy may be null. */
void NAME(logps_backward)(const T *logits, const int64_t *targets, const float *lse, const float *entropy,
                          const float *grad, const float *grad_entropy, T *out, long rows, long v,
                          float inverse_temperature) {
#pragma omp parallel for
  for (long r = 0; r < rows; r++) {
    const T *z = logits + r * v;
    T *o = out + r * v;
    float g = grad[r] * inverse_temperature, norm = lse[r];
    if (grad_entropy) {
      float ge = grad_entropy[r] * inverse_temperature, h = entropy[r];
#pragma omp simd
      for (long i = 0; i < v; i++) {
        float logp = LOAD(z[i]) * inverse_temperature - norm, p = fast_exp(logp);
        o[i] = STORE(-p * (g + ge * ((logp > -87.0f ? logp : -87.0f) + h)));
      }
    } else {
#pragma omp simd
      for (long i = 0; i < v; i++) o[i] = STORE(-g * fast_exp(LOAD(z[i]) * inverse_temperature - norm));
    }
    /* The target's entry once more, unrounded: its two terms nearly cancel where p is near 1. */
    long t = targets[r];
    float logp = LOAD(z[t]) * inverse_temperature - norm, p = fast_exp(logp);
    float value = g * (1.0f - p);
    if (grad_entropy) value -= grad_entropy[r] * inverse_temperature * p * ((logp > -87.0f ? logp : -87.0f) + entropy[r]);
    o[t] = STORE(value);
  }
}
