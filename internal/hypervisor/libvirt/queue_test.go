package libvirt

import (
	"context"
	"slices"
	"testing"
)

func TestQueue(t *testing.T) {
	q := newQueue[int]()
	go func() {
		for i := range 1000 {
			q.put(i)
		}
		q.close()
		q.put(-1) // too late
	}()
	var got []int
	q.all(t.Context(), func(i int) { got = append(got, i) })
	if len(got) != 1000 || !slices.IsSorted(got) || got[999] != 999 {
		t.Errorf("%d items: %v", len(got), got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	newQueue[int]().all(ctx, func(int) { t.Error("an item out of nowhere") })
}
