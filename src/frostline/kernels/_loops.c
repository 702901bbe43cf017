/* The loops of bits.py and windows.py, for memory that torch gave: each reads and writes it once.
 *
 * Addresses come as integers. Answers lie eight a byte, the first in the lowest bit. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#define HAS_SSE2
#endif

/* As Condition.kind in bits.py. Of NaN: NOT_UP_TO says yes, ABOVE no, and BETWEEN has nothing to say. */
enum { NOT_UP_TO, ABOVE, BETWEEN };

#define NOT_UP_TO_SAYS(x) (!((x) <= low))
#define ABOVE_SAYS(x) ((x) > low)
#define BETWEEN_SAYS(x) ((x) > low && (x) < high)

#define LOOP(SAYS)                                                                                                     \
    for (; i < count; i += 8) {                                                                                        \
        const Py_ssize_t here = count - i < 8 ? count - i : 8;                                                         \
        unsigned byte = 0;                                                                                             \
        for (Py_ssize_t j = 0; j < here; j++) {                                                                        \
            byte |= (unsigned)(SAYS(source[i + j])) << j;                                                              \
            nan |= source[i + j] != source[i + j];                                                                     \
        }                                                                                                              \
        bits[i / 8] = (uint8_t)byte;                                                                                   \
    }

/* Returns whether there was a NaN; what comes before i was done already. */
#define DEFINE_PACK(NAME, T)                                                                                           \
    static int NAME(int kind, const T *source, Py_ssize_t count, T low, T high, uint8_t *bits, Py_ssize_t i)           \
    {                                                                                                                  \
        int nan = 0;                                                                                                   \
        if (kind == NOT_UP_TO)                                                                                         \
            LOOP(NOT_UP_TO_SAYS)                                                                                       \
        else if (kind == ABOVE)                                                                                        \
            LOOP(ABOVE_SAYS)                                                                                           \
        else                                                                                                           \
            LOOP(BETWEEN_SAYS)                                                                                         \
        return nan;                                                                                                    \
    }

DEFINE_PACK(pack_floats, float)
DEFINE_PACK(pack_doubles, double)

#define DEFINE_LET_THROUGH(NAME, T)                                                                                    \
    static void NAME(const T *gradient, const uint8_t *bits, Py_ssize_t count, T *result, Py_ssize_t i)                \
    {                                                                                                                  \
        for (; i + 8 <= count; i += 8) {                                                                               \
            const T byte = bits[i / 8];                                                                                \
            for (int j = 0; j < 8; j++)                                                                                \
                result[i + j] = gradient[i + j] & (T)(0 - (byte >> j & 1));                                            \
        }                                                                                                              \
        for (; i < count; i++)                                                                                         \
            result[i] = gradient[i] & (T)(0 - (T)(bits[i / 8] >> i % 8 & 1));                                          \
    }

DEFINE_LET_THROUGH(let_through_16, uint16_t)
DEFINE_LET_THROUGH(let_through_32, uint32_t)
DEFINE_LET_THROUGH(let_through_64, uint64_t)

#define DEFINE_SCALE(NAME, T)                                                                                          \
    static void NAME(const T *gradient, const uint8_t *bits, Py_ssize_t count, T factor, T *result, Py_ssize_t i)      \
    {                                                                                                                  \
        const T factors[2] = {0, factor};                                                                              \
        for (; i < count; i++)                                                                                         \
            result[i] = gradient[i] * factors[bits[i / 8] >> i % 8 & 1];                                               \
    }

DEFINE_SCALE(scale_floats, float)
DEFINE_SCALE(scale_doubles, double)

#ifdef HAS_SSE2
/* Most of what there is to do, eight floats at a time: returns how many were done. */
static Py_ssize_t pack_most(int kind, const float *source, Py_ssize_t count, float low, float high, uint8_t *bits,
                            int *nan)
{
    const __m128 l = _mm_set1_ps(low), h = _mm_set1_ps(high);
    __m128 unordered = _mm_setzero_ps();
    const Py_ssize_t most = count / 8 * 8;
#define EIGHTS(SAYS)                                                                                                   \
    for (Py_ssize_t i = 0; i < most; i += 8) {                                                                         \
        const __m128 a = _mm_loadu_ps(source + i), b = _mm_loadu_ps(source + i + 4);                                   \
        unordered = _mm_or_ps(unordered, _mm_cmpunord_ps(a, b));                                                       \
        bits[i / 8] = (uint8_t)(_mm_movemask_ps(SAYS(a)) | _mm_movemask_ps(SAYS(b)) << 4);                             \
    }
#define FOUR_NOT_UP_TO(x) _mm_cmpnle_ps(x, l)
#define FOUR_ABOVE(x) _mm_cmpgt_ps(x, l)
#define FOUR_BETWEEN(x) _mm_and_ps(_mm_cmpgt_ps(x, l), _mm_cmplt_ps(x, h))
    if (kind == NOT_UP_TO)
        EIGHTS(FOUR_NOT_UP_TO)
    else if (kind == ABOVE)
        EIGHTS(FOUR_ABOVE)
    else
        EIGHTS(FOUR_BETWEEN)
    *nan = _mm_movemask_ps(unordered) != 0;
    return most;
}

/* All ones where the bit is set, of four floats each. */
static inline void spread(uint8_t byte, __m128 *first, __m128 *second)
{
    const __m128i low = _mm_set_epi32(8, 4, 2, 1), high = _mm_set_epi32(128, 64, 32, 16), all = _mm_set1_epi32(byte);
    *first = _mm_castsi128_ps(_mm_cmpeq_epi32(_mm_and_si128(all, low), low));
    *second = _mm_castsi128_ps(_mm_cmpeq_epi32(_mm_and_si128(all, high), high));
}

static Py_ssize_t let_most_through(const float *gradient, const uint8_t *bits, Py_ssize_t count, float *result)
{
    const Py_ssize_t most = count / 8 * 8;
    for (Py_ssize_t i = 0; i < most; i += 8) {
        __m128 a, b;
        spread(bits[i / 8], &a, &b);
        _mm_storeu_ps(result + i, _mm_and_ps(_mm_loadu_ps(gradient + i), a));
        _mm_storeu_ps(result + i + 4, _mm_and_ps(_mm_loadu_ps(gradient + i + 4), b));
    }
    return most;
}

static Py_ssize_t scale_most(const float *gradient, const uint8_t *bits, Py_ssize_t count, float factor, float *result)
{
    const __m128 by = _mm_set1_ps(factor);
    const Py_ssize_t most = count / 8 * 8;
    for (Py_ssize_t i = 0; i < most; i += 8) {
        __m128 a, b;
        spread(bits[i / 8], &a, &b);
        _mm_storeu_ps(result + i, _mm_mul_ps(_mm_loadu_ps(gradient + i), _mm_and_ps(a, by)));
        _mm_storeu_ps(result + i + 4, _mm_mul_ps(_mm_loadu_ps(gradient + i + 4), _mm_and_ps(b, by)));
    }
    return most;
}
#endif

static PyObject *pack(PyObject *module, PyObject *args)
{
    int kind, width, nan = 0;
    Py_ssize_t source, count, bits, done = 0;
    double low, high;
    if (!PyArg_ParseTuple(args, "iinnddn", &kind, &width, &source, &count, &low, &high, &bits))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (width == 4) {
#ifdef HAS_SSE2
        done = pack_most(kind, (const float *)source, count, (float)low, (float)high, (uint8_t *)bits, &nan);
#endif
        nan |= pack_floats(kind, (const float *)source, count, (float)low, (float)high, (uint8_t *)bits, done);
    } else {
        nan = pack_doubles(kind, (const double *)source, count, low, high, (uint8_t *)bits, done);
    }
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(nan);
}

static PyObject *let_through(PyObject *module, PyObject *args)
{
    int width;
    Py_ssize_t gradient, bits, count, result, done = 0;
    if (!PyArg_ParseTuple(args, "innnn", &width, &gradient, &bits, &count, &result))
        return NULL;
    const uint8_t *packed = (const uint8_t *)bits;
    Py_BEGIN_ALLOW_THREADS
    if (width == 2) {
        let_through_16((const uint16_t *)gradient, packed, count, (uint16_t *)result, done);
    } else if (width == 4) {
#ifdef HAS_SSE2
        done = let_most_through((const float *)gradient, packed, count, (float *)result);
#endif
        let_through_32((const uint32_t *)gradient, packed, count, (uint32_t *)result, done);
    } else {
        let_through_64((const uint64_t *)gradient, packed, count, (uint64_t *)result, done);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *scale(PyObject *module, PyObject *args)
{
    int width;
    Py_ssize_t gradient, bits, count, result, done = 0;
    double factor;
    if (!PyArg_ParseTuple(args, "innndn", &width, &gradient, &bits, &count, &factor, &result))
        return NULL;
    const uint8_t *packed = (const uint8_t *)bits;
    Py_BEGIN_ALLOW_THREADS
    if (width == 4) {
#ifdef HAS_SSE2
        done = scale_most((const float *)gradient, packed, count, (float)factor, (float *)result);
#endif
        scale_floats((const float *)gradient, packed, count, (float)factor, (float *)result, done);
    } else {
        scale_doubles((const double *)gradient, packed, count, factor, (double *)result, done);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Places: how many beside one another (outside), in each of three dimensions, and at each place (inside); the index at
 * which the first window of each dimension begins, and how far its windows are apart. */
typedef struct {
    Py_ssize_t outside, size[3], inside;
    int64_t first[3], apart[3];
} Places;

/* Runs BODY for each element at position i, whose window begins at `start`; the innermost loop goes along memory. */
#define FOR_EACH_PLACE(BODY)                                                                                           \
    Py_ssize_t i = 0;                                                                                                  \
    for (Py_ssize_t o = 0; o < p->outside; o++)                                                                        \
        for (Py_ssize_t x = 0; x < p->size[0]; x++)                                                                    \
            for (Py_ssize_t y = 0; y < p->size[1]; y++) {                                                              \
                const int64_t row = p->first[0] + x * p->apart[0] + p->first[1] + y * p->apart[1] + p->first[2];       \
                if (p->inside == 1) {                                                                                  \
                    for (Py_ssize_t z = 0; z < p->size[2]; z++, i++) {                                                 \
                        const int64_t start = row + z * p->apart[2];                                                   \
                        BODY                                                                                           \
                    }                                                                                                  \
                } else                                                                                                 \
                    for (Py_ssize_t z = 0; z < p->size[2]; z++) {                                                      \
                        const int64_t start = row + z * p->apart[2];                                                   \
                        for (Py_ssize_t c = 0; c < p->inside; c++, i++) {                                              \
                            BODY                                                                                       \
                        }                                                                                              \
                    }                                                                                                  \
            }

static void narrow_all(const Places *p, const int64_t *indices, const uint8_t *numbers, uint8_t *packed)
{
    if (numbers) {
        FOR_EACH_PLACE(packed[i] = numbers[indices[i] - start];)
    } else {
        FOR_EACH_PLACE(packed[i] = (uint8_t)(indices[i] - start);)
    }
}

static void widen_all(const Places *p, const uint8_t *packed, const int64_t *offsets, int64_t *indices)
{
    if (offsets) {
        FOR_EACH_PLACE(indices[i] = start + offsets[packed[i]];)
    } else {
        FOR_EACH_PLACE(indices[i] = start + packed[i];)
    }
}

static int places_and_memory(PyObject *args, Places *p, Py_ssize_t *source, Py_ssize_t *table, Py_ssize_t *target)
{
    long long first[3], apart[3];
    if (!PyArg_ParseTuple(args, "n(nnn)n(LLL)(LLL)nnn", &p->outside, &p->size[0], &p->size[1], &p->size[2], &p->inside,
                          &first[0], &first[1], &first[2], &apart[0], &apart[1], &apart[2], source, table, target))
        return 0;
    for (int d = 0; d < 3; d++) {
        p->first[d] = first[d];
        p->apart[d] = apart[d];
    }
    return 1;
}

static PyObject *narrow(PyObject *module, PyObject *args)
{
    Places places;
    Py_ssize_t indices, numbers, packed;
    if (!places_and_memory(args, &places, &indices, &numbers, &packed))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    narrow_all(&places, (const int64_t *)indices, (const uint8_t *)numbers, (uint8_t *)packed);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *widen(PyObject *module, PyObject *args)
{
    Places places;
    Py_ssize_t packed, offsets, indices;
    if (!places_and_memory(args, &places, &packed, &offsets, &indices))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    widen_all(&places, (const uint8_t *)packed, (const int64_t *)offsets, (int64_t *)indices);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"pack", pack, METH_VARARGS, "pack(kind, width, source, count, low, high, bits): whether there was a NaN."},
    {"let_through", let_through, METH_VARARGS, "let_through(width, gradient, bits, count, result)"},
    {"scale", scale, METH_VARARGS, "scale(width, gradient, bits, count, factor, result): by factor or by 0."},
    {"narrow", narrow, METH_VARARGS, "narrow(outside, size, inside, first, apart, indices, numbers or 0, packed)"},
    {"widen", widen, METH_VARARGS, "widen(outside, size, inside, first, apart, packed, offsets or 0, indices)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_loops", .m_doc = "Loops over memory.", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__loops(void)
{
    return PyModuleDef_Init(&definition);
}
