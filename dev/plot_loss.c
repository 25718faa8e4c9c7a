/*
Loss curves from log.txt files, as one SVG that needs nothing else.

    plot_loss [--out loss.svg] [--by step|time] [--y-max X] [--target X] LOG...

A log is a file or the directory that holds its log.txt; the published logs of the speedrun records
have the same lines. Validation loss is drawn thick, training loss thin in the same colour; where a
run has more steps than the picture has columns, each point of the training loss is the mean of some
steps, and the legend says so.

test        test/test_services.c: plot_loss
*/
#include "llmc/common.h"

#include <sys/stat.h>

enum {
    WIDTH = 960,
    HEIGHT = 540,
    LEFT = 70,
    RIGHT = 20,
    TOP = 20,
    BOTTOM = 56,
    MAX_RUNS = 8,
    COLUMNS = 400
};

// Distinguishable with every common colour vision (Okabe and Ito 2008).
static const char* const COLOURS[MAX_RUNS] = { "#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                               "#56b4e9", "#e69f00", "#000000", "#b0a000" };

typedef struct Point {
    double x, y;
} Point;

typedef struct Curve {
    Point* points;
    size_t count, room;
} Curve;

typedef struct Run {
    char name[256];
    Curve train, val;
    size_t mean_of;             // steps in a point of the training loss
} Run;

// ---- reading -------------------------------------------------------------------------------

static void curve_add(Curve* c, double x, double y) {
    if (!(y - y == 0 && x - x == 0))
        return;    // a loss that was not finite has no place on the axis
    if (c->count == c->room) {
        c->room = c->room ? 2 * c->room : 256;
        c->points = (Point*)realloc(c->points, c->room * sizeof(Point));
        REQUIRE(c->points, "out of memory: %zu points", c->room);
    }
    c->points[c->count].x = x;
    c->points[c->count++].y = y;
}

// Means of neighbours, until there are at most COLUMNS points. Returns how many went into one.
static size_t curve_thin(Curve* c) {
    size_t group = ceil_div(c->count, COLUMNS), kept = 0;
    if (group <= 1) return 1;
    for (size_t i = 0; i < c->count; i += group) {
        size_t n = c->count - i < group ? c->count - i : group;
        Point mean = { 0, 0 };
        for (size_t k = 0; k < n; k++) {
            mean.x += c->points[i + k].x / (double)n;
            mean.y += c->points[i + k].y / (double)n;
        }
        c->points[kept++] = mean;
    }
    c->count = kept;
    return group;
}

static void run_read(Run* run, const char* name, bool by_time) {
    char path[4096], line[1024];
    struct stat info;
    bool directory = stat(name, &info) == 0 && S_ISDIR(info.st_mode);
    int n = snprintf(path, sizeof path, "%s%s", name, directory ? "/log.txt" : "");
    REQUIRE(n > 0 && (size_t)n < sizeof path, "%s: the path is too long", name);
    FILE* file = fopen(path, "r");
    REQUIRE(file, "%s: %s", path, strerror(errno));
    snprintf(run->name, sizeof run->name, "%.255s", name);
    while (fgets(line, sizeof line, file)) {
        double step, steps, loss, ms = 0;
        char kind[16];
        if (sscanf(line, "step:%lf/%lf %15[a-z_]:%lf train_time:%lfms", &step, &steps, kind, &loss,
                   &ms) != 5)
            continue;
        double x = by_time ? ms / 1000 : step;
        if (strcmp(kind, "train_loss") == 0) curve_add(&run->train, x, loss);
        if (strcmp(kind, "val_loss") == 0) curve_add(&run->val, x, loss);
    }
    fclose(file);
    REQUIRE(run->train.count + run->val.count > 0,
            "%s: no line `step:S/N val_loss:V train_time:Tms ...` "
            "with a finite loss\nis it the log.txt of a run?",
            path);
    run->mean_of = curve_thin(&run->train);
}

// ---- drawing -------------------------------------------------------------------------------

typedef struct Axis {
    double low, high, step;     // the range and the distance of its ticks
    double from, to;            // where the range lies in the picture
} Axis;

// The range rounded outwards to ticks at 1, 2 or 5 times a power of ten.
static void axis_fit(Axis* a, double low, double high, int ticks) {
    if (!(high > low)) {
        low -= 0.5;
        high = low + 1;
    }
    double raw = (high - low) / ticks, power = pow(10, floor(log10(raw))), lead = raw / power;
    a->step = power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10);
    a->low = a->step * floor(low / a->step);
    a->high = a->step * ceil(high / a->step);
}

static double axis_at(const Axis* a, double v) {
    return a->from + (a->to - a->from) * (v - a->low) / (a->high - a->low);
}

static const char* axis_label(char* text, size_t size, const Axis* a, double v) {
    int digits = a->step >= 1 ? 0 : (int)ceil(-log10(a->step) - 1e-9);
    snprintf(text, size, "%.*f", digits, fabs(v) < a->step / 2 ? 0 : v);
    return text;
}

static void draw_axes(FILE* out, const Axis* x, const Axis* y, bool by_time) {
    char label[40];
    for (int i = 0; y->low + i * y->step <= y->high + y->step / 2; i++) {
        double v = y->low + i * y->step, at = axis_at(y, v);
        fprintf(out, "<path class=\"grid\" d=\"M%g %.1fH%g\"/>\n", x->from, at, x->to);
        fprintf(out, "<text x=\"%g\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n", x->from - 8,
                at + 4, axis_label(label, sizeof label, y, v));
    }
    for (int i = 0; x->low + i * x->step <= x->high + x->step / 2; i++) {
        double v = x->low + i * x->step, at = axis_at(x, v);
        fprintf(out, "<path class=\"axis\" d=\"M%.1f %gv5\"/>\n", at, y->from);
        fprintf(out, "<text x=\"%.1f\" y=\"%g\" text-anchor=\"middle\">%s</text>\n", at,
                y->from + 20, axis_label(label, sizeof label, x, v));
    }
    fprintf(out, "<path class=\"axis\" d=\"M%g %gV%gH%g\"/>\n", x->from, y->to, y->from, x->to);
    fprintf(out, "<text x=\"%g\" y=\"%d\" text-anchor=\"middle\">%s</text>\n",
            (x->from + x->to) / 2, HEIGHT - 14, by_time ? "training time (s)" : "step");
    fprintf(out, "<text transform=\"translate(18 %g) rotate(-90)\" text-anchor=\"middle\">"
            "loss (nats per token)</text>\n", (y->from + y->to) / 2);
}

static void draw_curve(FILE* out, const Curve* c, const Axis* x, const Axis* y, const char* colour,
                       bool val) {
    if (c->count == 0) return;
    fprintf(out, "<path class=\"%s\" stroke=\"%s\" d=\"", val ? "val" : "train", colour);
    for (size_t i = 0; i < c->count; i++) {
        fprintf(out, "%s%.1f %.1f", i ? "L" : "M", axis_at(x, c->points[i].x),
                axis_at(y, c->points[i].y));
    }
    fputs("\"/>\n", out);
    for (size_t i = 0; i < c->count && val && c->count <= 60; i++) {
        fprintf(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"2.5\" fill=\"%s\"/>\n",
                axis_at(x, c->points[i].x), axis_at(y, c->points[i].y), colour);
    }
}

// File names may hold what XML reserves.
static void draw_text(FILE* out, const char* text) {
    for (const unsigned char* c = (const unsigned char*)text; *c; c++) {
        if (*c == '<') fputs("&lt;", out);
        else if (*c == '>') fputs("&gt;", out);
        else if (*c == '&') fputs("&amp;", out);
        else if (*c == '"') fputs("&quot;", out);
        else fputc(*c < 0x20 || *c > 0x7e ? '?' : *c, out);
    }
}

static void draw_legend_line(FILE* out, int row, const char* kind, const char* colour) {
    fprintf(out, "<path class=\"%s\" stroke=\"%s\" d=\"M%d %dh26\"/>\n", kind, colour, WIDTH - 330,
            TOP + 20 + 20 * row - 4);
    fprintf(out, "<text x=\"%d\" y=\"%d\">", WIDTH - 296, TOP + 20 + 20 * row);
}

static void draw_legend(FILE* out, const Run* runs, int count) {
    int row = 0;
    for (int i = 0; i < count; i++) {
        const Run* run = &runs[i];
        size_t length = strlen(run->name), most = 30;
        char name[64];
        snprintf(name, sizeof name, "%s%s", length > most ? "..." : "",
                 run->name + (length > most ? length - most : 0));
        if (run->val.count) {
            draw_legend_line(out, row++, "val", COLOURS[i]);
            draw_text(out, name);
            fprintf(out, ": val, last %.4f</text>\n", run->val.points[run->val.count - 1].y);
        }
        if (run->train.count) {
            draw_legend_line(out, row++, "train", COLOURS[i]);
            draw_text(out, name);
            fputs(": train", out);
            if (run->mean_of > 1) fprintf(out, ", mean of %zu steps", run->mean_of);
            fputs("</text>\n", out);
        }
    }
}

static void draw(FILE* out, const Run* runs, int count, bool by_time, double y_max, double target) {
    double x_high = 0, y_low = INFINITY, y_high = -INFINITY;
    for (int i = 0; i < count; i++) {
        const Curve* curves[2] = { &runs[i].train, &runs[i].val };
        for (int k = 0; k < 2; k++) {
            for (size_t j = 0; j < curves[k]->count; j++) {
                Point p = curves[k]->points[j];
                if (p.x > x_high) x_high = p.x;
                if (p.y < y_low) y_low = p.y;
                if (p.y > y_high) y_high = p.y;
            }
        }
    }
    if (target > 0 && target < y_low) y_low = target;
    if (y_max > 0) {
        REQUIRE(y_max > y_low, "--y-max %g is below every loss; the lowest is %g", y_max, y_low);
        y_high = y_max;
    }
    Axis x, y;
    axis_fit(&x, 0, x_high, 8);
    axis_fit(&y, y_low, y_high, 7);
    x.high = x_high > 0 ? x_high : x.high;      // the curve may use the whole width
    x.from = LEFT;
    x.to = WIDTH - RIGHT;
    y.from = HEIGHT - BOTTOM;
    y.to = TOP;
    fprintf(out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" "
            "height=\"%d\">\n"
            "<style>text{font:13px "
            "sans-serif;fill:#222}.grid{stroke:#ddd}.axis{stroke:#222}path{fill:none}\n"
            ".train{stroke-width:1;stroke-opacity:.55}.val{stroke-width:2.2}.target{stroke:#222;"
            "stroke-dasharray:6 4}"
            "</style>\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
            WIDTH, HEIGHT, WIDTH, HEIGHT);
    draw_axes(out, &x, &y, by_time);
    fprintf(
        out,
        "<clipPath id=\"inside\"><rect x=\"%g\" y=\"%g\" width=\"%g\" height=\"%g\"/></clipPath>\n"
        "<g clip-path=\"url(#inside)\">\n",
        x.from, y.to - 3, x.to - x.from + 3, y.from - y.to + 3);
    for (int i = 0; i < count; i++) draw_curve(out, &runs[i].train, &x, &y, COLOURS[i], false);
    for (int i = 0; i < count; i++) draw_curve(out, &runs[i].val, &x, &y, COLOURS[i], true);
    if (target > 0) {
        fprintf(out,
                "<path class=\"target\" d=\"M%g %.1fH%g\"/>\n<text x=\"%g\" y=\"%.1f\">%g</text>\n",
                x.from, axis_at(&y, target), x.to, x.from + 8, axis_at(&y, target) - 5, target);
    }
    fputs("</g>\n", out);
    draw_legend(out, runs, count);
    fputs("</svg>\n", out);
}

// ---- main ----------------------------------------------------------------------------------

static double positive(const char* flag, const char* value) {
    char* end;
    double v = strtod(value, &end);
    REQUIRE(end != value && *end == 0 && v > 0 && v < 1e9, "%s wants a number above 0, got '%s'",
            flag, value);
    return v;
}

int main(int argc, char** argv) {
    static Run runs[MAX_RUNS];
    const char* path = "loss.svg";
    bool by_time = false;
    double y_max = 0, target = 0;
    int count = 0;
    program_name = "plot_loss";
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "--", 2) != 0) {
            argv[count++] = argv[i];    // the logs stay behind, in order
            continue;
        }
        const char *flag = argv[i], *value = argv[i + 1];
        bool known = strcmp(flag, "--out") == 0 || strcmp(flag, "--by") == 0 ||
                     strcmp(flag, "--y-max") == 0 || strcmp(flag, "--target") == 0;
        REQUIRE(known, "no flag %s; there are --out, --by, --y-max and --target", flag);
        REQUIRE(value, "%s wants a value", flag);
        i++;
        if (strcmp(flag, "--out") == 0) path = value;
        if (strcmp(flag, "--y-max") == 0) y_max = positive(flag, value);
        if (strcmp(flag, "--target") == 0) target = positive(flag, value);
        if (strcmp(flag, "--by") == 0) {
            by_time = strcmp(value, "time") == 0;
            REQUIRE(by_time || strcmp(value, "step") == 0, "--by must be step or time, got '%s'",
                    value);
        }
    }
    REQUIRE(count > 0, "no log to plot\n"
            "usage: plot_loss [--out loss.svg] [--by step|time] [--y-max X] [--target X] LOG...");
    REQUIRE(count <= MAX_RUNS, "%d logs; more than %d curves cannot be told apart", count,
            MAX_RUNS);
    for (int i = 0; i < count; i++) run_read(&runs[i], argv[i], by_time);
    // Drawn in memory first, so that a picture of before outlives an error.
    char* svg;
    size_t bytes;
    FILE* memory = open_memstream(&svg, &bytes);
    REQUIRE(memory, "out of memory: %s", strerror(errno));
    draw(memory, runs, count, by_time, y_max, target);
    fclose(memory);
    file_write(path, svg, bytes);
    free(svg);
    printf("%s\n", path);
    for (int i = 0; i < count; i++) {
        free(runs[i].train.points);
        free(runs[i].val.points);
    }
    return 0;
}
