/*
Outliers: how far a loss or a gradient norm is from what the last steps had.

    double z = window_z(&window, loss);     // 0: their mean; 3: three standard deviations above it
    if (!skipped) window_push(&window, loss);

A step that was skipped does not enter the window: a few of them would widen it until the next one
looks usual. A checkpoint holds the window, so that a resumed run judges as the undisturbed one
does. The mean and the deviation are summed afresh each time, from the oldest to the newest: WINDOW
doubles cost nothing beside a step, and no sum drifts away from what it stands for.

test        test/test_services.c: outliers
*/
#pragma once
#include <math.h>

enum { WINDOW = 128 };

typedef struct Window {
    double x[WINDOW];           // a ring
    int count, next;            // values in it; place of the next one
} Window;

// The i-th value, from the oldest on.
static inline double window_at(const Window* w, int i) {
    return w->x[(w->next - w->count + i + WINDOW) % WINDOW];
}

// (x - mean) / standard deviation of what is in the window; NAN until it is full, and where all in
// it are equal: there is no measure then. Sums are of differences from the oldest value, so that
// equal ones deviate by 0 and not by a rounding error.
static inline double window_z(const Window* w, double x) {
    double mean = 0, squares = 0, base = window_at(w, 0);
    if (w->count < WINDOW) return NAN;
    for (int i = 0; i < WINDOW; i++) mean += (window_at(w, i) - base) / WINDOW;
    for (int i = 0; i < WINDOW; i++) {
        double difference = window_at(w, i) - base - mean;
        squares += difference * difference;
    }
    double deviation = sqrt(squares / WINDOW);
    return deviation > 0 ? (x - base - mean) / deviation : NAN;
}

// The oldest value makes room. What is not finite stays out, or every z of the next 128 steps would
// be NAN.
static inline void window_push(Window* w, double x) {
    if (x - x != 0) return;
    w->x[w->next] = x;
    w->next = (w->next + 1) % WINDOW;
    if (w->count < WINDOW) w->count++;
}
