//go:build amd64

package dirtymap

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
	"github.com/lmctl/lmctl/internal/testenv"
)

const (
	flatRAM   = 64 << 20
	flatFirst = 1 << 20 / PageSize // first page that the guest writes
	flatPages = 12_000
)

// bootSector is a guest of its own: it increments the first word of each of
// pages pages from 1 MiB on, says '.' on the serial port, and begins again.
func bootSector(pages uint32) []byte {
	code := []byte{
		0xfa,       // cli
		0x31, 0xc0, // xor  %ax, %ax
		0x8e, 0xd8, // mov  %ax, %ds
		0xe4, 0x92, // in   $0x92, %al       A20
		0x0c, 0x02, // or   $2, %al
		0xe6, 0x92, // out  %al, $0x92
		0x66, 0x0f, 0x01, 0x16, 0x5c, 0x7c, // lgdtl 0x7c5c
		0x0f, 0x20, 0xc0, // mov  %cr0, %eax
		0x40,             // inc  %ax
		0x0f, 0x22, 0xc0, // mov  %eax, %cr0      protected mode
		0xea, 0x1d, 0x7c, 0x08, 0x00, // ljmp $8, $0x7c1d
		0x66, 0xb8, 0x10, 0x00, // mov  $16, %ax        32 bits from here
		0x8e, 0xd8, // mov  %ax, %ds
		0x66, 0xba, 0xf8, 0x03, // mov  $0x3f8, %dx     the serial port
		0xbf, 0x00, 0x00, 0x10, 0x00, // again: mov $0x100000, %edi
		0xb9, 0, 0, 0, 0, // mov  $pages, %ecx
		0xff, 0x07, // page: incl (%edi)
		0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add  $4096, %edi
		0x49,       // dec  %ecx
		0x75, 0xf5, // jnz  page
		0xb0, 0x2e, // mov  $'.', %al
		0xee,       // out  %al, (%dx)
		0xeb, 0xe6, // jmp  again
	}
	const countAt, gdtAt, gdtrAt = 0x2d, 0x44, 0x5c
	sector := make([]byte, 512)
	copy(sector, code)
	binary.LittleEndian.PutUint32(sector[countAt:], pages)
	binary.LittleEndian.PutUint64(sector[gdtAt+8:], 0x00cf9a000000ffff)  // code, 4 GiB
	binary.LittleEndian.PutUint64(sector[gdtAt+16:], 0x00cf92000000ffff) // data, 4 GiB
	binary.LittleEndian.PutUint16(sector[gdtrAt:], 23)
	binary.LittleEndian.PutUint32(sector[gdtrAt+2:], 0x7c00+gdtAt)
	binary.LittleEndian.PutUint16(sector[510:], 0xaa55)
	return sector
}

// flatGuest is a running QEMU with the boot sector's guest.
type flatGuest struct {
	*child
	region Region
	file   *os.File
	memory []byte // the file, mapped here too
	qmp    *json.Decoder
	conn   net.Conn
}

// startFlat boots the guest and waits until it writes memory.
func startFlat(t *testing.T, accel string, args ...string) *flatGuest {
	t.Helper()
	qemu := testenv.NeedQEMU(t)
	if accel == "kvm" {
		testenv.NeedKVM(t)
	} else {
		testenv.TCG(t)
	}
	dir := shmDir(t)
	ram, disk, sock := filepath.Join(dir, "ram"), filepath.Join(dir, "disk"), filepath.Join(dir, "qmp")
	if err := os.WriteFile(disk, append(bootSector(flatPages), make([]byte, 1<<20-512)...), 0o600); err != nil {
		t.Fatal(err)
	}
	g := &flatGuest{child: start(t, exec.Command(qemu, append([]string{
		"-nodefaults", "-display", "none", "-machine", "pc,memory-backend=ram", "-accel", accel,
		"-m", fmt.Sprint(flatRAM >> 20), "-serial", "stdio",
		"-object", fmt.Sprintf("memory-backend-file,id=ram,share=on,size=%d,mem-path=%s", flatRAM, ram),
		"-drive", "if=ide,format=raw,file=" + disk,
		"-qmp", "unix:" + sock + ",server=on,wait=off",
	}, args...)...))}
	if b, err := g.out.ReadByte(); err != nil || b != '.' {
		t.Fatalf("guest said %q, %v", b, err)
	}
	// From now on somebody has to read what it says.
	go func() { _, _ = g.out.WriteTo(discard{}) }()
	g.mapMemory(t, ram)
	conn, err := net.Dial("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	g.conn = conn
	t.Cleanup(func() { g.conn.Close() })
	g.qmp = json.NewDecoder(g.conn)
	g.execute(t, "qmp_capabilities")
	return g
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }

func (g *flatGuest) mapMemory(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	g.file = f
	t.Cleanup(func() { f.Close() })
	if g.memory, err = unix.Mmap(int(f.Fd()), 0, flatRAM, unix.PROT_READ, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(g.memory) })
	maps, err := sys.Maps(g.PID)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range maps {
		if m.Path == path {
			g.region = Region{Addr: m.Start, Size: m.End - m.Start}
		}
	}
	if g.region.Size != flatRAM {
		t.Fatalf("guest memory is mapped as %#x+%#x", g.region.Addr, g.region.Size)
	}
}

// execute has QEMU execute a command, and returns with its answer.
func (g *flatGuest) execute(t *testing.T, command string) {
	t.Helper()
	if _, err := fmt.Fprintf(g.conn, `{"execute":%q}`, command); err != nil {
		t.Fatal(err)
	}
	for {
		var answer struct {
			Return *json.RawMessage
			Error  *json.RawMessage
		}
		if err := g.qmp.Decode(&answer); err != nil {
			t.Fatal(err)
		}
		if answer.Error != nil {
			t.Fatalf("%s: %s", command, *answer.Error)
		}
		if answer.Return != nil {
			return
		}
	}
}

// untracked fails the test if anything of a tracker is in the process.
func untracked(t *testing.T, c *child) {
	t.Helper()
	c.noUserfaultfd(t)
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", c.PID))
	if err != nil {
		t.Fatal(err)
	}
	flags := 0
	for line := range strings.Lines(string(smaps)) {
		if !strings.HasPrefix(line, "VmFlags:") {
			continue
		}
		flags++
		for _, f := range strings.Fields(line)[1:] {
			if f == "uw" || f == "um" || f == "ui" {
				t.Errorf("a mapping is still registered: %s", line)
			}
		}
	}
	if flags == 0 {
		t.Error("no VmFlags in smaps")
	}
	if tracer, _, err := sys.Status(c.PID, "TracerPid"); err != nil || tracer != "0" {
		t.Errorf("traced by %s, %v", tracer, err)
	}
}
