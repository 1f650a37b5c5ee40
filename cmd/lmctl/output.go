package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
)

// printJSON prints one value, indented.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// printTable prints rows under a heading, in columns.
func printTable(w io.Writer, heading string, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, strings.Join(strings.Fields(heading), "\t"))
	for _, r := range rows {
		for i, cell := range r {
			if cell == "" {
				r[i] = "-"
			}
		}
		fmt.Fprintln(t, strings.Join(r, "\t"))
	}
	return t.Flush()
}

// printFields prints names and values, one a line; empty values are left out.
func printFields(w io.Writer, fields ...string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for i := 0; i+1 < len(fields); i += 2 {
		if fields[i+1] != "" {
			fmt.Fprintf(t, "%s:\t%s\n", fields[i], fields[i+1])
		}
	}
	return t.Flush()
}

// size is bytes with a binary prefix.
func size(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }

// brief is a duration with three digits that matter.
func brief(d time.Duration) string {
	switch {
	case d >= time.Minute:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	}
	return d.Round(time.Microsecond).String()
}

// parseSize reads a number of bytes like 512MiB, 2G or 1048576. Without an i
// the prefixes are decimal, as everywhere.
func parseSize(s string) (int64, error) {
	n, err := humanize.ParseBytes(s)
	if err != nil || n > 1<<62 {
		return 0, fmt.Errorf("%q is no size: write it like 512MiB", s)
	}
	return int64(n), nil
}

// rateValue is a flag for bytes a second, like 100MiB/s.
type rateValue int64

func (r *rateValue) Set(s string) error {
	n, err := parseSize(strings.TrimSuffix(s, "/s"))
	if err != nil {
		return fmt.Errorf("%q is no rate: write it like 100MiB/s", s)
	}
	*r = rateValue(n)
	return nil
}

func (r *rateValue) String() string {
	if *r == 0 {
		return "0"
	}
	return size(int64(*r)) + "/s"
}

func (r *rateValue) Type() string { return "rate" }

func itoa[T ~int | ~int32 | ~int64 | ~uint64](n T) string { return strconv.FormatInt(int64(n), 10) }
