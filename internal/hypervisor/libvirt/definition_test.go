package libvirt

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/testenv"
)

// TestRoomToDefine: libvirt is asked to define a domain only where it can write.
func TestRoomToDefine(t *testing.T) {
	testenv.NeedRoot(t)
	dir := t.TempDir()
	mount := func(flags uintptr) {
		t.Helper()
		if err := unix.Mount("lmctl-test", dir, "tmpfs", flags|unix.MS_NOSUID|unix.MS_NODEV, "size=4m"); err != nil {
			t.Fatal(err)
		}
	}
	mount(0)
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	d := &Driver{cfg: Config{QEMUConf: filepath.Join(dir, "qemu.conf")}}
	is := func(what string, want error, verdict hypervisor.Verdict, words string) {
		t.Helper()
		if err := roomToDefine(d.definitions()); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
		var c hypervisor.Checks
		d.examineDefinitions(&offer{Persistent: "<domain/>"}, &c)
		only(t, what, c, verdict, words)
	}
	is("the folder is to be made", nil, hypervisor.Pass, "has room")
	if err := os.Mkdir(d.definitions(), 0o700); err != nil {
		t.Fatal(err)
	}
	is("there is room", nil, hypervisor.Pass, "has room")
	if err := os.WriteFile(filepath.Join(dir, "ballast"), []byte(strings.Repeat("x", 4<<20-definitionRoom+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	is("next to no room", unix.ENOSPC, hypervisor.Fail, "is full")
	// As the unit has it for the agent, and not for libvirt.
	if err := os.Remove(filepath.Join(dir, "ballast")); err != nil {
		t.Fatal(err)
	}
	mount(unix.MS_REMOUNT | unix.MS_RDONLY)
	is("read-only", nil, hypervisor.Pass, "has room")
	var c hypervisor.Checks
	if d.examineDefinitions(&offer{}, &c); len(c) != 0 {
		t.Errorf("a transient domain needs none: %+v", c)
	}
}
