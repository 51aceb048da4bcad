/* Run the programs in the files that are named, and write the logits of FILE to FILE.out.

   tests/campaigns/neon.py compiles this with the kernels and writes the files: numbers of 64 bits (below),
   places in the memory that hold addresses, as offsets in it, and then the memory itself. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 2097152, LINE = 64, MAX_THREADS = 8 };

void run(int64_t *records, int64_t num_records, float *arena, float *input, float *output, int64_t to_next_input,
         int64_t to_next_output, int64_t num_images, int64_t num_threads, int64_t thread, int64_t *shared);

struct header {
    int64_t bytes, addresses, records, num_records, arena_floats, images, num_images, input_floats, output_floats,
        threads;
};

struct call {
    struct header of;
    char *memory;
    float *arena, *input, *output;
    int64_t num_images, thread, *shared;
};

static void fail(const char *what, const char *name) {
    fprintf(stderr, "%s: %s\n", name, what);
    exit(1);
}

static void *aligned(int64_t bytes) {
    int64_t size = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + ALIGNMENT;
    void *memory = aligned_alloc(ALIGNMENT, size);
    if (!memory) fail("no memory", "harness");
    return memset(memory, 0, size);
}

static void *work(void *given) {
    struct call *c = given;
    run((int64_t *)(c->memory + c->of.records), c->of.num_records, c->arena, c->input, c->output, c->of.input_floats,
        c->of.output_floats, c->num_images, c->of.threads, c->thread, c->shared);
    return NULL;
}

static void together(struct call call) {
    pthread_t threads[MAX_THREADS];
    struct call calls[MAX_THREADS];
    call.num_images = 1;
    call.shared = aligned((call.of.num_records * call.of.threads + 2) * LINE);
    for (int64_t number = 0; number < call.of.threads; number++) {
        calls[number] = call;
        calls[number].thread = number;
    }
    for (int64_t number = 1; number < call.of.threads; number++)
        if (pthread_create(&threads[number], NULL, work, &calls[number])) fail("no thread", "harness");
    work(&calls[0]);
    for (int64_t number = 1; number < call.of.threads; number++) pthread_join(threads[number], NULL);
    free(call.shared);
}

static void calculate(const char *name) {
    struct call call = {0};
    FILE *file = fopen(name, "rb");
    if (!file || fread(&call.of, sizeof call.of, 1, file) != 1) fail("cannot be read", name);
    struct header of = call.of;
    if (of.threads > MAX_THREADS) fail("too many threads", name);
    int64_t *addresses = aligned(8 * of.addresses), outputs = of.num_images * of.output_floats;
    call.memory = aligned(of.bytes);
    if ((int64_t)fread(addresses, 8, of.addresses, file) != of.addresses ||
        (int64_t)fread(call.memory, 1, of.bytes, file) != of.bytes)
        fail("ends early", name);
    fclose(file);
    for (int64_t number = 0; number < of.addresses; number++)
        *(int64_t *)(call.memory + addresses[number]) += (int64_t)call.memory;
    call.arena = aligned(4 * of.arena_floats);
    call.input = (float *)(call.memory + of.images);
    call.output = aligned(4 * outputs);
    for (int64_t number = 0; number < outputs; number++) call.output[number] = NAN;
    call.num_images = of.num_images;
    if (of.threads == 1) work(&call);
    for (int64_t image = 0; of.threads > 1 && image < of.num_images; image++) {
        together(call);
        call.input += of.input_floats;
        call.output += of.output_floats;
    }
    call.output -= of.threads > 1 ? outputs : 0;
    char path[4096];
    snprintf(path, sizeof path, "%s.out", name);
    file = fopen(path, "wb");
    if (!file || (int64_t)fwrite(call.output, 4, outputs, file) != outputs || fclose(file)) fail("cannot write", path);
    free(addresses);
    free(call.memory);
    free(call.arena);
    free(call.output);
}

int main(int count, char **names) {
    for (int number = 1; number < count; number++) calculate(names[number]);
    return 0;
}
