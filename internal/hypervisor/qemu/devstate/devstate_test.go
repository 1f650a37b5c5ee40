package devstate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

// stream builds one like QEMU's.
type stream struct{ bytes.Buffer }

func (s *stream) u8(v byte) *stream        { s.WriteByte(v); return s }
func (s *stream) u16(v uint16) *stream     { _ = binary.Write(s, binary.BigEndian, v); return s }
func (s *stream) u32(v uint32) *stream     { _ = binary.Write(s, binary.BigEndian, v); return s }
func (s *stream) u64(v uint64) *stream     { _ = binary.Write(s, binary.BigEndian, v); return s }
func (s *stream) text(v string) *stream    { s.WriteString(v); return s }
func (s *stream) named(v string) *stream   { return s.u8(byte(len(v))).text(v) }
func (s *stream) header() *stream          { return s.u32(fileMagic).u32(fileVersion) }
func (s *stream) machine(m string) *stream { return s.u8(configuration).u32(uint32(len(m))).text(m) }
func (s *stream) sub(name string) *stream  { return s.u8(subsection).named(name).u32(1) }
func (s *stream) capabilities(names ...string) *stream {
	s.sub("configuration/capabilities").u32(uint32(len(names)))
	for _, n := range names {
		s.named(n)
	}
	return s
}
func (s *stream) ramStart() *stream {
	return s.u8(sectionStart).u32(2).named("ram").u32(0).u32(ramVersion)
}
func (s *stream) block(name string, size uint64, address bool) *stream {
	s.named(name).u64(size)
	if address {
		s.u64(0xdead0000)
	}
	return s
}

const tail = "\x00\x00\x00\x00\x00\x00\x00\x10\x7e\x00\x00\x00\x02what follows is none of our business"

func rewritten(t *testing.T, in []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := Rewrite(&out, bytes.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestRewrite(t *testing.T) {
	uuid := "0123456789abcdef"
	tests := []struct {
		name     string
		in, want *stream
	}{
		{
			"as QEMU writes it",
			new(stream).header().machine("pc-i440fx-7.2").capabilities("x-ignore-shared").ramStart().u64(0x3000|flagMemSize).block("pc.ram", 0x2000, true).block("pc.rom", 0x1000, true).text(tail),
			new(stream).header().machine("pc-i440fx-7.2").ramStart().u64(0x3000|flagMemSize).block("pc.ram", 0x2000, false).block("pc.rom", 0x1000, false).text(tail),
		},
		{
			"subsections in another order, and commands",
			new(stream).header().machine("q35").sub("configuration/uuid").text(uuid).capabilities("a", "b").sub("configuration/target-page-bits").u32(12).
				u8(command).u16(1).u16(0).u8(command).u16(2).u16(4).u32(7).ramStart().u64(0x1000|flagMemSize).block("r", 0x1000, true),
			new(stream).header().machine("q35").sub("configuration/uuid").text(uuid).sub("configuration/target-page-bits").u32(12).
				u8(command).u16(1).u16(0).u8(command).u16(2).u16(4).u32(7).ramStart().u64(0x1000|flagMemSize).block("r", 0x1000, false),
		},
		{
			"no configuration section, no blocks",
			new(stream).header().ramStart().u64(flagMemSize).text(tail),
			new(stream).header().ramStart().u64(flagMemSize).text(tail),
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := rewritten(t, test.in.Bytes()); !bytes.Equal(got, test.want.Bytes()) {
				t.Errorf("got  %q\nwant %q", got, test.want.Bytes())
			}
			var out bytes.Buffer // byte by byte
			if err := Rewrite(&out, iotest.OneByteReader(bytes.NewReader(test.in.Bytes()))); err != nil || !bytes.Equal(out.Bytes(), test.want.Bytes()) {
				t.Errorf("byte by byte: %v, %q", err, out.Bytes())
			}
		})
	}
}

func TestRewriteRefuses(t *testing.T) {
	start := func() *stream { return new(stream).header().machine("pc") }
	many := func(n int, one func(*stream)) *stream {
		s := start()
		for range n {
			one(s)
		}
		return s
	}
	tests := []struct {
		name string
		in   *stream
		want string
	}{
		{"magic", new(stream).u32(1).u32(3), "byte 8: header: unknown format: magic 0x1"},
		{"version", new(stream).u32(fileMagic).u32(4), "version 4, not 3"},
		{"machine", new(stream).header().u8(configuration).u32(1 << 31), "a machine type of 2147483648 bytes"},
		{"subsection", start().sub("configuration/new"), `subsection "configuration/new"`},
		{"subsection version", start().u8(subsection).named("configuration/uuid").u32(2), "has version 2, not 1"},
		{"subsections", many(maxSubsections+1, func(s *stream) { s.capabilities() }), "more than 16 subsections"},
		{"capabilities", start().sub("configuration/capabilities").u32(1 << 20), "1048576 capabilities"},
		{"commands", many(maxCommands+1, func(s *stream) { s.u8(command).u16(1).u16(0) }), "more than 64 commands"},
		{"section", start().u8(4), "section type 0x4 where the ram section should start"},
		{"other section", start().u8(sectionStart).u32(1).named("block").u32(0).u32(1), ""},
		{"ram version", start().u8(sectionStart).u32(1).named("ram").u32(0).u32(5), "ram section version 5, not 4"},
		{"flags", start().ramStart().u64(0x1000 | flagMemSize | 0x10), "the flags 0x14"},
		{"size", start().ramStart().u64(1<<60 | flagMemSize), "bytes of RAM"},
		{"block too large", start().ramStart().u64(0x1000|flagMemSize).block("r", 0x2000, true), "a block of 8192 bytes where 4096 are left"},
		{"empty block", start().ramStart().u64(0x1000|flagMemSize).block("r", 0, true), "a block of 0 bytes"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			err := Rewrite(io.Discard, bytes.NewReader(test.in.Bytes()))
			var e *Error
			if !errors.As(err, &e) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v; want %q", err, test.want)
			}
		})
	}
}

// However short a stream is, its end in the part that is parsed is an error,
// and no more of it is written than was read.
func TestRewriteTruncated(t *testing.T) {
	in := new(stream).header().machine("pc").capabilities("x").ramStart().u64(0x1000|flagMemSize).block("r", 0x1000, true).Bytes()
	for n := range in {
		var out bytes.Buffer
		err := Rewrite(&out, bytes.NewReader(in[:n]))
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d bytes: %v", n, err)
		}
		if out.Len() > n {
			t.Errorf("%d bytes became %d", n, out.Len())
		}
	}
}

var errTest = errors.New("no more")

func TestRewriteErrors(t *testing.T) {
	in := new(stream).header().machine("pc").ramStart().u64(0x1000|flagMemSize).block("r", 0x1000, true).text(tail).Bytes()
	if err := Rewrite(io.Discard, io.MultiReader(bytes.NewReader(in[:20]), iotest.ErrReader(errTest))); !errors.Is(err, errTest) {
		t.Errorf("a reader that fails: %v", err)
	}
	if err := Rewrite(io.Discard, io.MultiReader(bytes.NewReader(in), iotest.ErrReader(errTest))); !errors.Is(err, errTest) {
		t.Errorf("a reader that fails late: %v", err)
	}
	if err := Rewrite(failingWriter{}, bytes.NewReader(in)); !errors.Is(err, errTest) {
		t.Errorf("a writer that fails: %v", err)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errTest }

// captured are beginnings of streams that QEMU wrote.
func captured(t testing.TB) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob("testdata/*.state")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no captured streams: %v", err)
	}
	all := make(map[string][]byte)
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(path)] = b
	}
	return all
}

func TestCaptured(t *testing.T) {
	for name, in := range captured(t) {
		t.Run(name, func(t *testing.T) {
			out := rewritten(t, in)
			if !bytes.Contains(in, []byte("x-ignore-shared")) || bytes.Contains(out, []byte("configuration/capabilities")) {
				t.Error("the capabilities are not taken out")
			}
			blocks := (len(in) - len(out) - len("\x05\x1aconfiguration/capabilities") - 4 - 4 - len("\x0fx-ignore-shared")) / 8
			if blocks < 4 || blocks > 32 {
				t.Errorf("%d bytes became %d: the addresses of %d blocks", len(in), len(out), blocks)
			}
			if !bytes.Contains(out, []byte("ram0")) {
				t.Error("the name of the guest's memory is gone")
			}
		})
	}
}

func FuzzRewrite(f *testing.F) {
	for _, in := range captured(f) {
		f.Add(in)
	}
	f.Add(new(stream).header().machine("pc").sub("configuration/uuid").text("0123456789abcdef").capabilities("a").ramStart().u64(0x1000|flagMemSize).block("r", 0x1000, true).text(tail).Bytes())
	f.Fuzz(func(t *testing.T, in []byte) {
		var out bytes.Buffer
		err := Rewrite(&out, bytes.NewReader(in))
		if out.Len() > len(in) {
			t.Fatalf("%d bytes became %d", len(in), out.Len())
		}
		var e *Error
		if err != nil && !errors.As(err, &e) {
			t.Fatalf("an error without a place: %v", err)
		}
		if err == nil && !bytes.HasPrefix(out.Bytes(), in[:8]) {
			t.Fatal("the header is not passed on")
		}
	})
}
