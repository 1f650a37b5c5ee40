// Package stats sums up a few measurements of the same thing.
package stats

import (
	"cmp"
	"slices"
)

// Number is what can be measured.
type Number interface{ ~int64 | ~float64 }

// Summary is the order statistics of a sample. The zero value is that of an
// empty one.
type Summary[T Number] struct {
	N      int `json:"n"`
	Min    T   `json:"min"`
	Median T   `json:"median"`
	Max    T   `json:"max"`
}

// Of sums a sample up, which it leaves as it is. The median of an even number
// of values is the mean of the middle two, rounded towards the lower one.
func Of[T Number](sample []T) Summary[T] {
	n := len(sample)
	if n == 0 {
		return Summary[T]{}
	}
	s := slices.Clone(sample)
	slices.SortFunc(s, cmp.Compare[T])
	median := s[n/2]
	if n%2 == 0 {
		low, high := s[n/2-1], s[n/2]
		median = low + (high-low)/2
	}
	return Summary[T]{N: n, Min: s[0], Median: median, Max: s[n-1]}
}

// Ratio is how many times b goes into a; 0 if b is 0, where there is none.
func Ratio[T Number](a, b T) float64 {
	if b == 0 {
		return 0
	}
	return float64(a) / float64(b)
}
