// Attention with 64 elements a head, for Hopper.
#define HEAD_DIM 64
