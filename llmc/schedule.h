/*
Everything that changes with time, as pure functions of the step: nothing is carried from step to
step, so a run that resumes, and a test that asks for step 3649 alone, see the same numbers.

    lr_mult(t)   1                                    t <  S - K
                 r + (1 - r) (S - t) / K              t >= S - K        K = round(cooldown_frac S)
    momentum(t)  a + (mu - a) min(t / W, 1)           W warm-up steps from a to mu

S is --steps and t the 0-based index of the update. r is --final-lr-frac; it would be reached at
t = S, one step after the last, as in the records. The learning rate has no warm-up: none of the
recipes has one.

test        test/test_services.c: schedule
source      the recipes' own change points: scripts/recipes
*/
#pragma once
#include "flags.h"

typedef struct Schedule {
    float lr_mult;          // times every peak learning rate
    float muon_momentum;
} Schedule;

// Steps of the cool-down. A fraction of the run, so that a shortened run keeps the shape of the
// recipe.
static inline int64_t schedule_cooldown(const Settings* s) {
    return (int64_t)(s->cooldown_frac * (double)s->steps + 0.5);
}

static inline Schedule schedule_at(const Settings* s, int64_t step) {
    int64_t cooldown = schedule_cooldown(s), left = s->steps - step;
    double lr = 1;
    if (left <= 0) lr = cooldown ? s->final_lr_frac : 1;
    else if (left < cooldown)
        lr = s->final_lr_frac + (1 - s->final_lr_frac) * (double)left / (double)cooldown;
    double part = step < s->muon_momentum_warmup ? (double)step / (double)s->muon_momentum_warmup
                                                 : 1;
    double momentum = s->muon_momentum_start + (s->muon_momentum - s->muon_momentum_start) * part;
    Schedule now;
    now.lr_mult = (float)lr;
    now.muon_momentum = (float)(part < 1 ? momentum : s->muon_momentum);
    return now;
}
