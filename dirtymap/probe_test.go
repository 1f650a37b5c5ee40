package dirtymap

import (
	"errors"
	"os"
	"testing"
)

// TestProbe: a kernel that is new enough can track.
func TestProbe(t *testing.T) {
	err := Probe()
	if err == nil {
		if again := Probe(); again != nil {
			t.Errorf("the second answer differs: %v", again)
		}
		return
	}
	if !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrPermission) {
		t.Errorf("neither missing nor forbidden: %v", err)
	}
	if release, rerr := os.ReadFile("/proc/sys/kernel/osrelease"); rerr == nil {
		t.Skipf("kernel %s cannot track: %v", release, err)
	}
}
