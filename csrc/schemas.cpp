// Which schemas (tdkern/ops/_schemas.py) a library's kernels were written for. ops/_backends.py
// reads this in the file, before it loads it.
extern "C" __attribute__((used, visibility("default"))) const char tdkern_schemas[] =
    "tdkern schemas: " TDKERN_SCHEMAS;
