// Attention with 128 elements a head, for Hopper.
#define HEAD_DIM 128
