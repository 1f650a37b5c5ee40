package flat

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/internal/testenv"
)

// The assembled sector that is checked in is the one that flat.S gives.
func TestSectorMatchesSource(t *testing.T) {
	for _, tool := range []string{"gcc", "ld"} {
		testenv.NeedTool(t, tool)
	}
	dir := t.TempDir()
	obj, bin := filepath.Join(dir, "flat.o"), filepath.Join(dir, "flat.bin")
	for _, argv := range [][]string{
		{"gcc", "-m32", "-c", "flat.S", "-o", obj},
		{"ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", obj, "-o", bin},
	} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
		}
	}
	got, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, sector) {
		t.Fatal("flat.bin is not what flat.S assembles to: build it again as flat.S says")
	}
}

func TestImageParameters(t *testing.T) {
	le := binary.LittleEndian
	tests := []struct {
		name                 string
		cfg                  Config
		pages, chunk, report uint32
		delta, paced         byte
		divisor              uint16
	}{
		{"idle", Config{Memory: 64 << 20}, 0, 0, 1023, 1, 1, 1193},
		{"unbounded", Config{Memory: 128 << 20, Pages: 25344, Rate: Unbounded}, 25344, 16, 1<<14 - 1, 1, 0, 1193},
		{"paced", Config{Memory: 128 << 20, Pages: 1000, Rate: 25600}, 1000, 26, 1023, 1, 1, 1212},
		{"slow", Config{Memory: 128 << 20, Pages: 1000, Rate: 5}, 1000, 1, 31, 1, 1, 62799},
		{"rewrite", Config{Memory: 128 << 20, Pages: 1000, Rate: 1000, Pattern: Rewrite}, 1000, 1, 1023, 0, 1, 1193},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			img, err := tt.cfg.Image()
			if err != nil {
				t.Fatal(err)
			}
			if len(img) != DiskSize {
				t.Fatalf("image of %d bytes", len(img))
			}
			if le.Uint32(img[offPages:]) != tt.pages || le.Uint32(img[offSpan:]) != tt.pages*PageSize ||
				le.Uint32(img[offFirst:]) != FirstPage || le.Uint32(img[offEnd:]) != FirstPage+tt.pages*PageSize {
				t.Errorf("range: % x", img[offFirst:offStep])
			}
			if got := le.Uint32(img[offChunk:]); got != tt.chunk {
				t.Errorf("chunk %d, want %d", got, tt.chunk)
			}
			if got := le.Uint32(img[offReport:]); got != tt.report {
				t.Errorf("report %d, want %d", got, tt.report)
			}
			if got := le.Uint16(img[offDivisor:]); got != tt.divisor {
				t.Errorf("divisor %d, want %d", got, tt.divisor)
			}
			if img[offDelta] != tt.delta || img[offPaced] != tt.paced {
				t.Errorf("delta %d paced %d, want %d %d", img[offDelta], img[offPaced], tt.delta, tt.paced)
			}
		})
	}
}

func TestImageRefuses(t *testing.T) {
	for want, cfg := range map[string]Config{
		"16 MiB is the least": {Memory: 1 << 20},
		"do not fit":          {Memory: 64 << 20, Pages: 64 << 8, Rate: 1},
		"no pages to dirty":   {Memory: 64 << 20, Rate: 1},
		"rate of -2":          {Memory: 64 << 20, Pages: 1, Rate: -2},
		"no such pattern":     {Memory: 64 << 20, Pattern: "backwards"},
	} {
		if _, err := cfg.Image(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v, want one with %q", cfg, err, want)
		}
	}
}

// A pass visits each page once, whatever the number of pages.
func TestStrideVisitsEachPageOnce(t *testing.T) {
	for pages := 1; pages < 700; pages++ {
		c := Config{Pages: pages, Pattern: Random}
		seen := make([]bool, pages)
		for i, p := 0, 0; i < pages; i, p = i+1, (p+c.stride())%pages {
			if seen[p] {
				t.Fatalf("%d pages: page %d comes twice", pages, p)
			}
			seen[p] = true
		}
	}
}

// fakeMemory is the memory of a guest with the given state and page values, in
// visiting order.
func fakeMemory(c Config, s State, values []uint32) *bytes.Reader {
	mem := make([]byte, c.Memory)
	le := binary.LittleEndian
	copy(mem[StateAddr:], "LMFG\x01\x00\x00\x00")
	le.PutUint64(mem[StateAddr+8:], s.Counter)
	le.PutUint32(mem[StateAddr+16:], s.Pass)
	if s.Failed {
		le.PutUint32(mem[StateAddr+24:], 1)
	}
	for i, v := range values {
		le.PutUint32(mem[c.addr(i*c.stride()%c.Pages):], v)
	}
	return bytes.NewReader(mem)
}

func TestCheck(t *testing.T) {
	run := Config{Memory: 16 << 20, Pages: 6, Rate: Unbounded, Pattern: Random}
	rewrite := run
	rewrite.Pattern = Rewrite
	tests := []struct {
		name    string
		cfg     Config
		state   State
		values  []uint32
		stopped bool
		want    string
	}{
		{"in the middle of a pass", run, State{Pass: 4}, []uint32{5, 5, 4, 4, 4, 4}, true, ""},
		{"before a pass", run, State{Pass: 4}, []uint32{4, 4, 4, 4, 4, 4}, true, ""},
		{"before it is noted", run, State{Pass: 4}, []uint32{5, 5, 5, 5, 5, 5}, true, ""},
		{"wrapped round", run, State{Pass: 0xffffffff}, []uint32{0, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, true, ""},
		{"an old page", run, State{Pass: 4}, []uint32{5, 5, 4, 3, 4, 4}, true, "holds 3, not 4"},
		{"a page left out", run, State{Pass: 4}, []uint32{5, 4, 5, 4, 4, 4}, true, "holds 5, not 4"},
		{"running, anything of two passes", run, State{Pass: 4}, []uint32{5, 4, 5, 4, 5, 4}, false, ""},
		{"running, an old page", run, State{Pass: 4}, []uint32{5, 3, 4, 4, 4, 4}, false, "holds 3"},
		{"rewritten", rewrite, State{Pass: 9}, []uint32{0, 0, 0, 0, 0, 0}, true, ""},
		{"rewritten wrongly", rewrite, State{Pass: 9}, []uint32{0, 0, 0, 1, 0, 0}, true, "holds 1, not 0"},
		{"its own verdict", run, State{Failed: true}, nil, false, "where it had written"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := tt.cfg.Check(fakeMemory(tt.cfg, tt.state, tt.values), tt.stopped)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
	if _, err := run.Check(bytes.NewReader(make([]byte, 16<<20)), true); err == nil {
		t.Error("empty memory passes for a guest")
	}
	if _, err := run.Check(bytes.NewReader(nil), true); err == nil {
		t.Error("no memory passes for a guest")
	}
}
