/* A compiled ranking to compare with: one argsort per query, then one walk down the ranks.
 *
 * Protocol: Zheng et al., ICCV 2015. Gallery images of the query's identity and camera are passed over. AP is the mean of
 * hits / rank over the hits; INP the number of hits over the rank of the last one (Ye et al., TPAMI 2021).
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BITS 11
#define BUCKETS (1 << BITS)

/* Order of float32 values as the order of unsigned integers. */
static uint32_t sortable(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Stable argsort of one row by three counting passes; `work` holds 2 * count pairs of key and index. */
static void argsort_row(const float *row, int64_t count, uint64_t *work, int64_t *order) {
    uint64_t *from = work, *to = work + count;
    uint32_t starts[3][BUCKETS];
    memset(starts, 0, sizeof starts);
    for (int64_t i = 0; i < count; i++) {
        uint32_t key = sortable(row[i]);
        from[i] = (uint64_t)key << 32 | (uint32_t)i;
        for (int pass = 0; pass < 3; pass++) starts[pass][key >> (pass * BITS) & (BUCKETS - 1)]++;
    }
    for (int pass = 0; pass < 3; pass++) {
        uint32_t sum = 0;
        for (int bucket = 0; bucket < BUCKETS; bucket++) {
            uint32_t held = starts[pass][bucket];
            starts[pass][bucket] = sum;
            sum += held;
        }
        int shift = 32 + pass * BITS;
        for (int64_t i = 0; i < count; i++) to[starts[pass][from[i] >> shift & (BUCKETS - 1)]++] = from[i];
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    for (int64_t i = 0; i < count; i++) order[i] = (uint32_t)from[i];
}

/* Stable argsort of every row of (queries, gallery) distances; returns 0, or 1 when memory is short. */
int argsort_rows(const float *distances, int64_t queries, int64_t gallery, int64_t *order) {
    uint64_t *work = malloc(2 * (size_t)gallery * sizeof *work);
    if (!work) return 1;
    for (int64_t q = 0; q < queries; q++) argsort_row(distances + q * gallery, gallery, work, order + q * gallery);
    free(work);
    return 0;
}

/* Walk down the ranks of every query. `first` is the rank of the first hit, 0 where a query has none. */
void walk(const int64_t *order, int64_t queries, int64_t gallery, const int64_t *query_pids, const int64_t *gallery_pids,
          const int64_t *query_cams, const int64_t *gallery_cams, double *ap, double *inp, int64_t *first) {
    for (int64_t q = 0; q < queries; q++) {
        const int64_t *ranked = order + q * gallery;
        int64_t rank = 0, hits = 0, last = 0;
        double sum = 0.0;
        first[q] = 0;
        for (int64_t i = 0; i < gallery; i++) {
            int64_t image = ranked[i];
            int same = gallery_pids[image] == query_pids[q];
            if (same && gallery_cams[image] == query_cams[q]) continue;
            rank++;
            if (!same) continue;
            hits++;
            if (hits == 1) first[q] = rank;
            last = rank;
            sum += (double)hits / (double)rank;
        }
        ap[q] = hits ? sum / (double)hits : 0.0;
        inp[q] = hits ? (double)hits / (double)last : 0.0;
    }
}
