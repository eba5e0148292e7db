// Attention with 256 elements a head: rows of the tiles, so that two blocks fit an sm_80 or sm_90 multiprocessor and
// one fits an sm_86, sm_89 or sm_120 (99 KiB of shared memory).
#define HEAD_DIM 256
#define FORWARD_QUERIES 64
#define FORWARD_KEYS 32
#define DQ_QUERIES 64
#define DQ_KEYS 16
#define DKV_KEYS 64
#define DKV_QUERIES 16
