/* impl.c - the implementation and nothing else. */
#define DIFFDPO_IMPLEMENTATION
#include "../../diffdpo.h"
#include "../../diffdpo.h"                /* a second time is harmless */
