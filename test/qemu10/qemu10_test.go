// Package qemu10 tests that the QEMU of scripts/fetch-qemu10 serves: it runs
// guests of an older machine type on real KVM, and is the process that was
// started.
package qemu10

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/testenv"
)

const memory = 32 << 20

// deadline bounds a guest's way into its loop: SeaBIOS takes seconds where KVM
// emulates.
const deadline = 90 * time.Second

func TestFlatGuest(t *testing.T) {
	testenv.NeedKVM(t)
	binary, firmware := testenv.NeedQEMU10(t)
	for _, c := range []struct {
		name, machine string
		args          []string
	}{
		{"own", "pc", nil},
		{"older", "pc-i440fx-7.2", nil},
		{"firmware named", "pc-i440fx-7.2", []string{"-L", firmware}},
	} {
		t.Run(c.name, func(t *testing.T) { bootFlat(t, binary, c.machine, c.args) })
	}
}

func bootFlat(t *testing.T, binary, machine string, args []string) {
	cfg := flat.Config{Memory: memory, Pages: 500, Rate: flat.Unbounded}
	image, err := cfg.Image()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	disk, ram := filepath.Join(dir, "disk"), filepath.Join(dir, "ram")
	if err := os.WriteFile(disk, image, 0o600); err != nil {
		t.Fatal(err)
	}
	args = append(args, "-nodefaults", "-display", "none", "-vga", "none", "-accel", "kvm",
		"-machine", machine+",memory-backend=ram", "-m", "32M",
		"-object", "memory-backend-file,id=ram,share=on,size=32M,mem-path="+ram,
		"-drive", "if=ide,format=raw,file="+disk)
	pid, ended := start(t, binary, args)

	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(deadline)
	for state, err := read(ram); err != nil || state.Pass < 2; state, err = read(ram) {
		select {
		case <-tick.C:
		case words := <-ended:
			t.Fatalf("QEMU ended: %s", words)
		case <-late:
			t.Fatalf("no second pass: %+v, %v", state, err)
		}
	}
	f, err := os.Open(ram)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := cfg.Check(f, false); err != nil {
		t.Error(err)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		t.Fatal(err)
	}
	if filepath.Base(exe) != "qemu-system-x86_64" {
		t.Errorf("the process that was started is %s, not QEMU", exe)
	}
}

func read(ram string) (flat.State, error) {
	f, err := os.Open(ram)
	if err != nil {
		return flat.State{}, err
	}
	defer f.Close()
	return flat.ReadState(f)
}

// start runs QEMU until the test ends. What it said comes through ended if it
// goes before.
func start(t *testing.T, binary string, args []string) (pid int, ended <-chan string) {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.Command(binary, args...)
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	words, waited := make(chan string, 1), make(chan error, 1)
	go func() {
		err := cmd.Wait()
		words <- stderr.String()
		waited <- err
	}()
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("kill QEMU: %v", err)
		}
		var exit *exec.ExitError
		if err := <-waited; err != nil && !errors.As(err, &exit) {
			t.Errorf("wait for QEMU: %v", err)
		}
	})
	return cmd.Process.Pid, words
}
