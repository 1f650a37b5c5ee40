package directio

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
)

// patience bounds what a test waits for; it measures nothing.
const patience = 3 * time.Minute

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// newHost makes a driver with folders of its own, which ends its guests with
// the test.
func newHost(t *testing.T) *qemu.Driver {
	t.Helper()
	memory, err := os.MkdirTemp("/dev/shm", "lmctl-test-")
	if err != nil {
		testenv.Missing(t, "a tmpfs at /dev/shm", err)
	}
	d, err := qemu.New(qemu.Config{
		StateDir: filepath.Join(t.TempDir(), "state"), RunDir: filepath.Join(t.TempDir(), "run"), MemoryDir: memory,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(errors.Join(err, os.RemoveAll(memory)))
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		for _, g := range d.List() {
			if g.PID == 0 {
				continue
			}
			if err := d.Destroy(ctx, g.Name); err != nil {
				t.Error(err)
			}
		}
		if err := errors.Join(d.Close(), os.RemoveAll(memory)); err != nil {
			t.Error(err)
		}
	})
	if err := d.Adopt(within(t)); err != nil {
		t.Fatal(err)
	}
	return d
}

// settings are those of a guest that does nothing of its own.
func settings() control.Settings {
	s := control.Defaults()
	s.Memory.WorkingSet, s.Static, s.Device = 8<<20, 4<<20, "/dev/vda"
	return s
}

// startGuest boots a Linux guest under TCG on a host and waits until it is at
// work.
func startGuest(t *testing.T, host *qemu.Driver, disk *slowDisk) string {
	t.Helper()
	testenv.NeedQEMU(t)
	cache, err := linux.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	init, err := linux.BuildInit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	boot, err := linux.Prepare(t.Context(), cache, init, func(what string) { t.Log(what) })
	if err != nil {
		testenv.Missing(t, "Debian's cloud kernel", err)
	}
	testenv.TCG(t)
	text, err := (&qemu.Definition{
		Name: "reader", Memory: 160 << 20, VCPUs: 1, Accelerator: qemu.AcceleratorTCG,
		Kernel: boot.Kernel, Initrd: boot.Initrd, Cmdline: linux.Console + " " + settings().Cmdline(),
		Disks: []qemu.Disk{{Path: disk.path, Format: "raw", Cache: "none"}},
	}).YAML()
	if err != nil {
		t.Fatal(err)
	}
	def, err := host.Define(text)
	if err != nil {
		t.Fatal(err)
	}
	ctx := within(t)
	if err := host.Start(ctx, def.Name); err != nil {
		t.Fatal(err)
	}
	conn := console(t, host, def.Name)
	defer conn.Close()
	await(t, conn, control.ReadyMark)
	return def.Name
}

// console connects to the guest's serial console.
func console(t *testing.T, host *qemu.Driver, name string) net.Conn {
	t.Helper()
	path, err := host.Console(name)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// await waits for a line with a mark, and returns what follows the mark.
func await(t *testing.T, conn net.Conn, mark string) []byte {
	t.Helper()
	for in := bufio.NewReader(conn); ; {
		line, err := in.ReadString('\n')
		if err != nil {
			t.Fatalf("the guest's console: wait for %q: %v", mark, err)
		}
		if rest, ok := strings.CutPrefix(line, mark); ok {
			return []byte(rest)
		}
	}
}

// ask sends the guest a request over its serial console and returns its answer.
func ask(t *testing.T, host *qemu.Driver, name string, req control.Request) control.Status {
	t.Helper()
	conn := console(t, host, name)
	defer conn.Close()
	line, err := json.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(append(line, '\n')); err != nil {
		t.Fatal(err)
	}
	st, err := control.ParseReply(await(t, conn, control.ReplyMark))
	if err != nil {
		t.Fatalf("%s: %v", req.Do, err)
	}
	return st
}

// healthy has the guest check its memory and its disk, and sees it go on.
func healthy(t *testing.T, host *qemu.Driver, name string) {
	t.Helper()
	st := ask(t, host, name, control.Request{Do: control.CheckAll})
	if !st.OK || len(st.Problems) > 0 || st.Memory.Mismatches+st.Disk.Mismatches+st.Disk.Errors > 0 {
		t.Fatalf("the guest is not well: %+v, disk %+v", st, st.Disk)
	}
	for ctx := within(t); ; {
		later := ask(t, host, name, control.Request{Do: control.GetStatus})
		if later.BootID != st.BootID {
			t.Fatalf("the guest has booted anew: %+v after %+v", later, st)
		}
		if later.Clock.Ticks > st.Clock.Ticks {
			return
		}
		if err := ctx.Err(); err != nil {
			t.Fatalf("the guest does not go on: %+v after %+v", later, st)
		}
	}
}

// serve lets a receiver serve connections to a loopback port. Once stop is
// called it takes no more of them, and stop returns when it has done with all.
func serve(t *testing.T, r *migrate.Receiver) (address string, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var group errgroup.Group
	group.Go(func() error {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			if err != nil {
				return err
			}
			group.Go(func() error {
				if err := r.Serve(context.Background(), conn, "host1"); err != nil {
					t.Logf("the destination: %v", err)
				}
				return nil
			})
		}
	})
	return l.Addr().String(), func() {
		if err := errors.Join(l.Close(), group.Wait()); err != nil {
			t.Error(err)
		}
	}
}
