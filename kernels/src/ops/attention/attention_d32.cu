// Attention with 32 elements a head, which small models have: the tiles of 64 elements, of half of the bytes.
#define HEAD_DIM 32
#define FORWARD_QUERIES 128
#define FORWARD_KEYS 64
#define DQ_QUERIES 128
#define DQ_KEYS 64
#define DKV_KEYS 128
#define DKV_QUERIES 64
