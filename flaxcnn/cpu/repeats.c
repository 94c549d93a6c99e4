/* XLA's calls of oneDNN that Python has prepared, made again without Python.
 *
 * Python answers the first call of a kind, and hands over what it did as a plan: the primitives of
 * the library, or functions of our own, in their order, and from where their arguments come
 * (`plans.py`). Later calls with the same attribute, and arrays of the same types and shapes, are
 * made from here: without the GIL, for which XLA's threads would wait, and without what Python
 * reads in memory for each. What is not known here, and where one of a plan's checks fails, Python
 * is asked.
 *
 * The structures are those of version 0 of xla/ffi/api/c_api.h, as in `xla_handlers.py`, and of
 * version 3 of oneapi/dnnl/dnnl_types.h.
 */

#include <math.h>
#include <float.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of the C files as they were compiled; `compiled.py` compares it with the files as they are. */
const uint32_t sources_checksum = SOURCES_CHECKSUM;

/* ----------------------------------------------------------------------------- XLA's structures */
typedef struct {
    size_t size;
    void *extension;
} head;

typedef struct {
    head head;
    int32_t type;
    void *data;
    int64_t rank;
    int64_t *sizes;
} buffer;

typedef struct {
    head head;
    int64_t count;
    void *types;
    buffer **items;
} buffers;

typedef struct {
    int32_t type;
    size_t count;
    int64_t *numbers;
} attribute;

typedef struct {
    head head;
    int64_t count;
    void *types;
    void *names;
    attribute **items;
} attributes;

typedef struct {
    head head;
    const char *message;
    int32_t code;
} error_text;

typedef struct {
    head head;
    struct {
        head head;
        int32_t major, minor;
    } version;
    void *internal;
    void *(*create_error)(error_text *);
} api;

typedef struct {
    head head;
    api *api;
    void *context;
    int32_t stage;
    buffers arguments;
    buffers results;
    attributes attributes;
} frame;

typedef void *(*handler)(frame *);

enum { EXECUTE = 3, INTERNAL = 13 };

/* --------------------------------------------------------------------------------------- oneDNN */
typedef struct {
    int32_t index;
    void *memory;
} argument;

/* One of our own, as those of `winograd.c`. */
typedef void function(const void *numbers, void *const *arrays);

static struct {
    int (*place)(void *memory, void *address);
    int (*execute)(void *primitive, void *stream, int count, argument *arguments);
    int (*threads)(void);
    void (*set_threads)(int);
} library;

void use_library(void *place, void *execute, void *threads, void *set_threads) {
    library.place = (int (*)(void *, void *))place;
    library.execute = (int (*)(void *, void *, int, argument *))execute;
    library.threads = (int (*)(void))threads;
    library.set_threads = (void (*)(int))set_threads;
}

/* ---------------------------------------------------------------------------------------- plans */
/* In 64-bit integers, as `Plan.words` has them: the library's stream, bytes of memory for work, how
 * many checks come before the calls, how many calls, how many checks after them; then these. */
enum { STREAM, WORKING, BEFORE, CALLS, AFTER, BEGINNING };
/* A check: its condition, which two arrays, and how many elements these have. */
enum { CONDITION, FIRST, SECOND, ELEMENTS, CHECK };
enum { SAME, USUAL_FLOAT32, USUAL_BFLOAT16, FINITE };
/* A call: the primitive, by whom it is computed, how many arguments, where they are, and then a
 * place for each. A place is an array's number, or ~ how many bytes behind the beginning of the
 * memory for work. In place of the primitive a call of `OURS` has the function, and in that of its
 * arguments the numbers that the function is given besides. */
enum { PRIMITIVE, BY, COUNT, ARGUMENTS, PLACES };
enum { THREADS, ALONE /* the calling thread */, OURS };

enum { PAGE = 4096 /* as in `plans.py` */, OUT_OF_MEMORY = 1 /* dnnl_out_of_memory */ };
enum { MOST_OF_OURS = 8 /* arrays that one of our functions is given */ };

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
static char *work;
static int64_t work_size;

static void *at(int64_t place, void *const *addresses) {
    return place < 0 ? work + ~place : addresses[place];
}

/* The answer of the library's function that failed, or 0. */
static int make_calls(const int64_t *plan, void *const *addresses) {
    if (work_size < plan[WORKING]) {
        int64_t pages = (plan[WORKING] + PAGE - 1) / PAGE;
        free(work);
        work = aligned_alloc(PAGE, PAGE * pages);
        work_size = work ? PAGE * pages : 0;
        if (!work) return OUT_OF_MEMORY;
    }
    const int64_t *call = plan + BEGINNING + CHECK * plan[BEFORE];
    for (int64_t i = 0; i < plan[CALLS]; i++, call += PLACES + call[COUNT]) {
        if (call[BY] == OURS) {
            void *arrays[MOST_OF_OURS];
            for (int64_t k = 0; k < call[COUNT]; k++) arrays[k] = at(call[PLACES + k], addresses);
            ((function *)call[PRIMITIVE])((const void *)call[ARGUMENTS], arrays);
            continue;
        }
        argument *arguments = (argument *)call[ARGUMENTS];
        for (int64_t k = 0; k < call[COUNT]; k++) {
            int wrong = library.place(arguments[k].memory, at(call[PLACES + k], addresses));
            if (wrong) return wrong;
        }
        /* A primitive is executed as it was made: it divides its work when it is made. */
        int several = call[BY] == ALONE ? library.threads() : 0;
        if (several) library.set_threads(1);
        int wrong = library.execute(
            (void *)call[PRIMITIVE], (void *)plan[STREAM], (int)call[COUNT], arguments);
        if (several) library.set_threads(several);
        if (wrong) return wrong;
    }
    return 0;
}

/* The calls of a plan for Python, without its checks. */
int run_plan(const int64_t *plan, void *const *addresses) {
    pthread_mutex_lock(&one_at_a_time);
    int wrong = make_calls(plan, addresses);
    pthread_mutex_unlock(&one_at_a_time);
    return wrong;
}

/* --------------------------------------------------------------------------------------- checks */
/* As `_usual` of `onednn_pool.py` and `_finite` of `onednn_norm.py`. */
static int usual_float32(const float *x, int64_t count) {
    int32_t unusual = 0;
    for (int64_t i = 0; i < count; i++) unusual |= !(x[i] > -FLT_MAX);
    return !unusual;
}

static int usual_bfloat16(const uint16_t *x, int64_t count) {
    int16_t unusual = 0;
    for (int64_t i = 0; i < count; i++) unusual |= (x[i] >= 0xFF7F) | ((int16_t)x[i] > 0x7F80);
    return !unusual;
}

static int finite(const float *a, const float *b, int64_t count) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
    return isfinite(sum);
}

static int hold(const int64_t *check, int64_t count, void *const *addresses) {
    for (; count--; check += CHECK) {
        const void *first = at(check[FIRST], addresses), *second = at(check[SECOND], addresses);
        int holds = 0;
        switch (check[CONDITION]) {
        case SAME: holds = first == second; break;
        case USUAL_FLOAT32: holds = usual_float32(first, check[ELEMENTS]); break;
        case USUAL_BFLOAT16: holds = usual_bfloat16(first, check[ELEMENTS]); break;
        case FINITE: holds = finite(first, second, check[ELEMENTS]); break;
        }
        if (!holds) return 0;
    }
    return 1;
}

/* ----------------------------------------------------------------------- what tells calls apart */
enum { TARGETS = 24, WORDS = 256, ARRAYS = 32 };

typedef struct {
    int64_t count, hash;
    int64_t words[WORDS];
} key;

/* 0 where there is no room. */
static int read_arrays(key *key, const buffers *arrays, void **addresses) {
    key->words[key->count++] = arrays->count;
    for (int64_t i = 0; i < arrays->count; i++) {
        const buffer *array = arrays->items[i];
        if (key->count + 3 + array->rank > WORDS) return 0;
        key->words[key->count++] = array->type;
        key->words[key->count++] = array->rank;
        memcpy(key->words + key->count, array->sizes, array->rank * sizeof(int64_t));
        key->count += array->rank;
        addresses[i] = array->data;
    }
    return 1;
}

static int read_frame(int64_t target, const frame *frame, key *key, void **addresses) {
    const attribute *attribute = frame->attributes.items[0];
    if (frame->arguments.count + frame->results.count > ARRAYS || attribute->count + 4 > WORDS)
        return 0;
    key->count = 0;
    key->words[key->count++] = target;
    key->words[key->count++] = attribute->count;
    memcpy(key->words + key->count, attribute->numbers, attribute->count * sizeof(int64_t));
    key->count += attribute->count;
    if (!read_arrays(key, &frame->arguments, addresses)) return 0;
    if (!read_arrays(key, &frame->results, addresses + frame->arguments.count)) return 0;
    uint64_t hash = 0;
    for (int64_t i = 0; i < key->count; i++) {
        hash = (hash ^ (uint64_t)key->words[i]) * 0x9E3779B97F4A7C15u; /* 2^64 / golden ratio */
        hash ^= hash >> 32;
    }
    key->hash = (int64_t)hash;
    return 1;
}

/* ------------------------------------------------------------------------------ the known calls */
enum { SLOTS = 1 << 13, MOST = SLOTS / 2 };

typedef struct {
    int64_t hash, count;
    int64_t *words;
    const int64_t *plan;
} known;

/* For the life of the process; what is in it is never changed. */
static _Atomic(known *) table[SLOTS];
static pthread_mutex_t one_adds = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int64_t known_count;

static const int64_t *find(const key *key) {
    for (uint64_t i = (uint64_t)key->hash;; i++) {
        known *found = atomic_load_explicit(&table[i % SLOTS], memory_order_acquire);
        if (!found) return 0;
        if (found->hash == key->hash && found->count == key->count &&
            !memcmp(found->words, key->words, key->count * sizeof(int64_t)))
            return found->plan;
    }
}

/* Has calls like this one made from here. Whether it keeps the plan, which then has to stay. */
int repeat(int64_t target, const frame *frame, const int64_t *plan) {
    key key;
    void *addresses[ARRAYS];
    if (target >= TARGETS || known_count >= MOST) return 0;
    if (!read_frame(target, frame, &key, addresses) || find(&key)) return 0;
    int kept = 0;
    pthread_mutex_lock(&one_adds);
    if (known_count < MOST && !find(&key)) {
        size_t bytes = key.count * sizeof(int64_t);
        known *new = malloc(sizeof(known));
        int64_t *words = malloc(bytes);
        if (new && words) {
            memcpy(words, key.words, bytes);
            *new = (known){key.hash, key.count, words, plan};
            uint64_t i = (uint64_t)key.hash;
            while (atomic_load(&table[i % SLOTS])) i++;
            atomic_store_explicit(&table[i % SLOTS], new, memory_order_release);
            known_count++;
            kept = 1;
        } else {
            free(new);
            free(words);
        }
    }
    pthread_mutex_unlock(&one_adds);
    return kept;
}

/* ------------------------------------------------------------------------------------- handlers */
static handler by_python[TARGETS];

static void *handle(int64_t target, frame *frame) {
    handler python = by_python[target];
    if (frame->head.extension || frame->stage != EXECUTE) return python(frame);
    key key;
    void *addresses[ARRAYS];
    if (!read_frame(target, frame, &key, addresses)) return python(frame);
    const int64_t *plan = find(&key);
    if (!plan || !hold(plan + BEGINNING, plan[BEFORE], addresses)) return python(frame);
    int wrong = plan[CALLS] ? run_plan(plan, addresses) : 0;
    if (wrong) {
        /* Not by Python once more: a sum may have been added already. XLA copies the message. */
        char message[80];
        const char *says = "oneDNN answered %d to a call that it took before";
        snprintf(message, sizeof(message), says, wrong);
        error_text text = {{sizeof(error_text), 0}, message, INTERNAL};
        return frame->api->create_error(&text);
    }
    if (plan[AFTER]) {
        const int64_t *after = plan + BEGINNING + CHECK * plan[BEFORE];
        for (int64_t i = 0; i < plan[CALLS]; i++) after += PLACES + after[COUNT];
        if (!hold(after, plan[AFTER], addresses)) return python(frame);
    }
    return 0;
}

/* XLA tells a handler nothing of the name by which it calls, so that each has one of its own. */
#define HANDLER(n) static void *handle_##n(frame *frame) { return handle(n, frame); }
#define TIMES_24(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) \
    X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)
TIMES_24(HANDLER)
#define NAME(n) handle_##n,
static const handler handlers[TARGETS] = {TIMES_24(NAME)};

/* What XLA is to call for a target instead of Python's handler; 0 where there are no more. */
void *handler_for(int64_t target, void *python) {
    if (target < 0 || target >= TARGETS) return 0;
    by_python[target] = (handler)python;
    return (void *)handlers[target];
}
