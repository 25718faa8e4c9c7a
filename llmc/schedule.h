/*
Everything that changes with time, as pure functions of the step: nothing is carried from step to
step, so a run that resumes, and a test that asks for step 3649 alone, see the same numbers.

t is the 0-based index of the update, N is --steps, X --extension-steps, S = N - X.

    lr_mult(t)   1                                      S - t >= K
                 r + (1 - r) max(S - t, least) / K      after        K = cooldown_frac S
    momentum(t)  a + (mu - a) t / W                     t < W
                 mu - (mu - a) (t - N + E) / E          t > N - E
                 mu                                     else
    window(t)    ramp:   the least number of blocks that hold window_max t / S tokens, at least 1
                 thirds: of n windows the one numbered n t / S; from S on window_extension
    Adam         at t = e - 1, 2 e - 1, ... where e is --adam-every

r is --final-lr-frac; without extension steps it would be reached at t = N, one step after the last.
`least` is S / 10,000 if there are extension steps, else 0: record 45 stops its clock there. The
learning rate has no warm-up: none of the recipes has one. Long layers have the window above, the
others half of it, rounded down, but at least 1. A validation before step t sees what step t sees;
the last one is schedule_final.

YaRN: each change of the long window from w to w' blocks of `block` tokens multiplies the
attention's scale by 1 + 0.2 ln(w'/w) and each frequency f by w/w' + g (1 - w/w'), where
g = (block w f / 2 pi - 1) / 31, kept in 0..1: what turns often within a window stays, what turns
less than once slows down.

test        test/test_services.c: schedule
source      the recipes' own change points: scripts/recipes; Peng et al. 2023, "YaRN: Efficient
            Context Window Extension of Large Language Models", arXiv:2309.00071
*/
#pragma once
#include "flags.h"

typedef struct Schedule {
    float lr_mult;                     // times every peak learning rate
    float muon_momentum;
    int window_long, window_short;     // blocks of --window-block tokens; 0: no limit
    float attn_scale;                  // of the scores
    bool adam_now;
    int64_t adam_step;                 // Adam's steps up to this one, itself included if adam_now
} Schedule;

// Steps of the cool-down, not rounded: the records' clocks are fractions of the run, too.
static inline double schedule_cooldown(const Settings* s) {
    return s->cooldown_frac * (double)(s->steps - s->extension_steps);
}

static inline float schedule_lr(const Settings* s, int64_t step) {
    double scheduled = (double)(s->steps - s->extension_steps), left = scheduled - (double)step;
    double cooldown = schedule_cooldown(s), least = s->extension_steps ? scheduled / 10000 : 0;
    if (left < least) left = least;
    if (left >= cooldown) return 1;
    return (float)(s->final_lr_frac + (1 - s->final_lr_frac) * left / cooldown);
}

static inline float schedule_momentum(const Settings* s, int64_t step) {
    double rise = s->muon_momentum - s->muon_momentum_start, part = 1;
    int64_t into = step - (s->steps - s->muon_momentum_cooldown);
    if (step < s->muon_momentum_warmup) part = (double)step / (double)s->muon_momentum_warmup;
    else if (into > 0) part = 1 - (double)into / (double)s->muon_momentum_cooldown;
    return (float)(part == 1 ? s->muon_momentum : s->muon_momentum_start + rise * part);
}

// ---- windows and YaRN ----------------------------------------------------------------------

// The long windows up to this step, one after another. Returns how many.
static inline int schedule_thirds(const Settings* s, int64_t step, int windows[LIST_ROOM + 1]) {
    int n = list_numbers("window-steps", s->window_steps, windows, LIST_ROOM);
    int64_t scheduled = s->steps - s->extension_steps;
    if (step < scheduled) return (int)(n * step / scheduled) + 1;
    windows[n] = (int)s->window_extension;
    return n + 1;
}

// In blocks.
static inline int schedule_window(const Settings* s, int64_t step) {
    int windows[LIST_ROOM + 1];
    if (s->windows == FLAG_WINDOWS_NONE) return 0;
    if (s->windows == FLAG_WINDOWS_THIRDS) return windows[schedule_thirds(s, step, windows) - 1];
    int64_t scheduled = s->steps - s->extension_steps, now = step < scheduled ? step : scheduled;
    int64_t unit = scheduled * s->window_block;
    int64_t blocks = (s->window_max * now + unit - 1) / unit;      // in whole numbers: exact
    return blocks > 1 ? (int)blocks : 1;
}

static inline float schedule_attn_scale(const Settings* s, int64_t step) {
    double scale = s->attn_scale > 0 ? s->attn_scale
                                     : 1 / sqrt((double)(s->channels / s->heads));
    int windows[LIST_ROOM + 1], n = s->yarn ? schedule_thirds(s, step, windows) : 0;
    for (int i = 1; i < n; i++) scale *= 1 + 0.2 * log((double)windows[i] / windows[i - 1]);
    return (float)scale;
}

// f_j for j < D/2, the angle per position of pair j: base^(-2j/D), or with half_truncate
// base^(-j/(D/4 - 1)) for the first half of the pairs and 0 for the others. Every step is rounded
// to float, as in the recipes' tensors: at t = 1023 an angle in double would differ from theirs by
// up to 3e-5. PyTorch makes j/(D/4 - 1) from the nearer end, in steps that are rounded. What is
// volatile is rounded even where the compiler has a fused multiply-add.
static inline void rotary_frequencies(float* f, int D, double base, bool half_truncate) {
    int turning = D / 4;
    float step = 1.0f / (float)(turning - 1);
    for (int j = 0; j < D / 2; j++) {
        volatile float back = step * (float)(turning - 1 - j);
        float half = j < turning / 2 ? step * (float)j : 1.0f - back;
        float whole = (float)(2 * j) / (float)D;
        if (half_truncate) f[j] = j < turning ? (float)pow(1 / base, (double)half) : 0;
        else f[j] = 1.0f / (float)pow(base, (double)whole);
    }
}

// The frequencies after all changes of the window up to this step.
static inline void schedule_frequencies(float* f, const Settings* s, int D, int64_t step) {
    rotary_frequencies(f, D, s->rotary_base, s->rotary_half != 0);
    int windows[LIST_ROOM + 1], n = s->yarn ? schedule_thirds(s, step, windows) : 0;
    for (int i = 1; i < n; i++) {
        double ratio = (double)windows[i - 1] / windows[i];
        for (int j = 0; j < D / 2; j++) {
            float turns = (float)(s->window_block * windows[i - 1]) * f[j] / (float)(2 * M_PI);
            float keep = (turns - 1) / 31;
            keep = keep < 0 ? 0 : keep > 1 ? 1 : keep;
            volatile float rest = keep * (float)(1 - ratio);
            f[j] *= (float)ratio + rest;
        }
    }
}

// ---- all of it -----------------------------------------------------------------------------

static inline Schedule schedule_at(const Settings* s, int64_t step) {
    Schedule now;
    now.lr_mult = schedule_lr(s, step);
    now.muon_momentum = schedule_momentum(s, step);
    now.window_long = schedule_window(s, step);
    now.window_short = now.window_long > 1 ? now.window_long / 2 : now.window_long;
    now.attn_scale = schedule_attn_scale(s, step);
    now.adam_now = (step + 1) % s->adam_every == 0;
    now.adam_step = (step + 1) / s->adam_every;
    return now;
}

// Of the last validation. Its longer window comes without a change of frequencies or scale.
static inline Schedule schedule_final(const Settings* s) {
    Schedule now = schedule_at(s, s->steps);
    if (s->windows == FLAG_WINDOWS_THIRDS && s->window_final > 0)
        now.window_long = (int)s->window_final;
    return now;
}
