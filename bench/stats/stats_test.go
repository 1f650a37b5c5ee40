package stats

import (
	"math"
	"slices"
	"testing"
	"time"
)

func TestOf(t *testing.T) {
	for _, c := range []struct {
		sample []int64
		want   Summary[int64]
	}{
		{nil, Summary[int64]{}},
		{[]int64{7}, Summary[int64]{1, 7, 7, 7}},
		{[]int64{9, 1}, Summary[int64]{2, 1, 5, 9}},
		{[]int64{4, 1}, Summary[int64]{2, 1, 2, 4}},
		{[]int64{3, 1, 2}, Summary[int64]{3, 1, 2, 3}},
		{[]int64{5, 5, 1, 100}, Summary[int64]{4, 1, 5, 100}},
		{[]int64{-3, -1, -2}, Summary[int64]{3, -3, -2, -1}},
		{[]int64{math.MaxInt64, math.MaxInt64 - 2}, Summary[int64]{2, math.MaxInt64 - 2, math.MaxInt64 - 1, math.MaxInt64}},
	} {
		before := slices.Clone(c.sample)
		if got := Of(c.sample); got != c.want {
			t.Errorf("Of(%v) = %+v, want %+v", c.sample, got, c.want)
		}
		if !slices.Equal(before, c.sample) {
			t.Errorf("Of reordered %v to %v", before, c.sample)
		}
	}
}

func TestOfDurationsAndFloats(t *testing.T) {
	if got := Of([]time.Duration{time.Second, time.Minute, time.Millisecond}); got.Median != time.Second || got.Max != time.Minute {
		t.Errorf("durations: %+v", got)
	}
	if got := Of([]float64{1, 2}); got.Median != 1.5 {
		t.Errorf("floats: %+v", got)
	}
}

func TestRatio(t *testing.T) {
	if r := Ratio(3*time.Second, 2*time.Second); r != 1.5 {
		t.Errorf("3 s to 2 s: %v", r)
	}
	if r := Ratio[int64](3, 0); r != 0 {
		t.Errorf("to nothing: %v", r)
	}
}
