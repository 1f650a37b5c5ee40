package queue

import (
	"context"
	"slices"
	"testing"
)

func TestQueue(t *testing.T) {
	q := New[int]()
	go func() {
		for i := range 1000 {
			q.Put(i)
		}
		q.Close()
		q.Put(-1) // too late
	}()
	var got []int
	q.All(t.Context(), func(i int) { got = append(got, i) })
	if len(got) != 1000 || !slices.IsSorted(got) || got[999] != 999 {
		t.Errorf("%d items: %v", len(got), got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	New[int]().All(ctx, func(int) { t.Error("an item out of nowhere") })
}
