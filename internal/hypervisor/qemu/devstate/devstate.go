// Package devstate rewrites the device state that a QEMU writes with the
// migration capability x-ignore-shared, so that a QEMU without that capability
// loads it: one that libvirt is just preparing cannot be told to set it.
//
// Two things are taken out, both near the beginning of the stream: the
// subsection configuration/capabilities, in which the destination would find
// a capability that it does not have, and in the ram section's set-up part the
// 8-byte address that follows each block's name and length. The rest passes
// untouched. The format is that of QEMU's migration/savevm.c and ram.c; all
// integers are big-endian.
//
//	"QEVM" be32 3                                  magic, version
//	0x07 be32 n, n bytes machine type              configuration
//	  { 0x05 u8 n, n bytes name, be32 version, data }
//	{ 0x08 be16 command, be16 n, n bytes }         with a return path only
//	0x01 be32 id, u8 n, "ram", be32 instance, be32 version
//	  be64 total | 0x04
//	  { u8 n, n bytes name, be64 length [, be64 address] }  lengths add up to total
//	...                                            passed on
package devstate

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Error says where a stream is not what it should be.
type Error struct {
	Offset int64  // bytes from the beginning of QEMU's stream
	Part   string // what was being read
	Err    error
}

func (e *Error) Error() string {
	return fmt.Sprintf("device state: byte %d: %s: %v", e.Offset, e.Part, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// errFormat is the ground of all errors but those of reading and writing.
var errFormat = errors.New("unknown format")

// Limits on what is parsed.
const (
	maxMachine      = 256     // bytes of a machine type's name
	maxSubsections  = 16      // of the configuration section
	maxCapabilities = 256     // in configuration/capabilities
	maxCommands     = 64      // before the ram section
	maxCommand      = 1 << 16 // bytes of a command, a be16
	maxBlocks       = 4096    // of RAM
	maxRAM          = 1 << 52 // bytes
	pageMask        = 0xfff
)

// The stream's marks.
const (
	fileMagic   = 0x5145564d // QEVM
	fileVersion = 3

	sectionStart  = 0x01
	subsection    = 0x05
	configuration = 0x07
	command       = 0x08

	flagMemSize = 0x04
	ramVersion  = 4
)

// Rewrite copies the stream from r to w, rewritten, until r ends. The stream
// must have been written with x-ignore-shared and without postcopy-ram. What
// is parsed is written in whole parts, and r's errors come back wrapped.
func Rewrite(w io.Writer, r io.Reader) error {
	p := &parser{r: bufio.NewReaderSize(r, 64<<10), w: bufio.NewWriterSize(w, 64<<10)}
	err := p.header()
	if flushErr := p.w.Flush(); err == nil {
		err = flushErr
	}
	if err != nil {
		return err
	}
	if _, err := p.r.WriteTo(w); err != nil {
		return fmt.Errorf("device state: copy: %w", err)
	}
	return nil
}

type parser struct {
	r      *bufio.Reader
	w      *bufio.Writer
	offset int64
	part   string

	back   io.Writer // the return path's other direction, nil if there is none
	opened bool      // QEMU waits for what is said there
	ack    bool      // the switchover is to be allowed there
}

func (p *parser) header() error {
	steps := []struct {
		part string
		do   func() error
	}{
		{"header", p.magic},
		{"configuration section", p.configuration},
		{"commands", p.commands},
		{"ram section", p.ram},
	}
	for _, s := range steps {
		p.part = s.part
		if err := s.do(); err != nil {
			return err
		}
	}
	return nil
}

func (p *parser) fail(err error) error { return &Error{Offset: p.offset, Part: p.part, Err: err} }

func (p *parser) malformed(format string, args ...any) error {
	return p.fail(fmt.Errorf("%w: "+format, append([]any{errFormat}, args...)...))
}

// take reads n bytes without passing them on.
func (p *parser) take(n int) ([]byte, error) {
	b := make([]byte, n)
	got, err := io.ReadFull(p.r, b)
	p.offset += int64(got)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, p.fail(err)
	}
	return b, nil
}

func (p *parser) put(b []byte) error {
	if _, err := p.w.Write(b); err != nil {
		return p.fail(err)
	}
	return nil
}

// pass reads n bytes and passes them on.
func (p *parser) pass(n int) ([]byte, error) {
	b, err := p.take(n)
	if err != nil {
		return nil, err
	}
	return b, p.put(b)
}

// mark looks at the next byte.
func (p *parser) mark() (byte, error) {
	b, err := p.r.Peek(1)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return 0, p.fail(err)
	}
	return b[0], nil
}

func (p *parser) magic() error {
	b, err := p.pass(8)
	if err != nil {
		return err
	}
	if m := binary.BigEndian.Uint32(b); m != fileMagic {
		return p.malformed("magic %#x, not %#x", m, fileMagic)
	}
	if v := binary.BigEndian.Uint32(b[4:]); v != fileVersion {
		return p.malformed("version %d, not %d", v, fileVersion)
	}
	return nil
}

func (p *parser) configuration() error {
	m, err := p.mark()
	if err != nil || m != configuration {
		return err // a machine type may do without
	}
	b, err := p.pass(5)
	if err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(b[1:])
	if n > maxMachine {
		return p.malformed("a machine type of %d bytes", n)
	}
	if _, err := p.pass(int(n)); err != nil {
		return err
	}
	for range maxSubsections {
		m, err := p.mark()
		if err != nil || m != subsection {
			return err
		}
		if err := p.subsection(); err != nil {
			return err
		}
	}
	return p.malformed("more than %d subsections", maxSubsections)
}

func (p *parser) subsection() error {
	head, err := p.take(2)
	if err != nil {
		return err
	}
	name, err := p.take(int(head[1]))
	if err != nil {
		return err
	}
	version, err := p.take(4)
	if err != nil {
		return err
	}
	if v := binary.BigEndian.Uint32(version); v != 1 {
		return p.malformed("subsection %q has version %d, not 1", name, v)
	}
	size := 0
	switch string(name) {
	case "configuration/capabilities":
		return p.dropCapabilities()
	case "configuration/target-page-bits":
		size = 4
	case "configuration/uuid":
		size = 16
	default:
		return p.malformed("subsection %q", name)
	}
	if err := errors.Join(p.put(head), p.put(name), p.put(version)); err != nil {
		return err
	}
	_, err = p.pass(size)
	return err
}

func (p *parser) dropCapabilities() error {
	b, err := p.take(4)
	if err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(b)
	if n > maxCapabilities {
		return p.malformed("%d capabilities", n)
	}
	for range n {
		length, err := p.take(1)
		if err != nil {
			return err
		}
		if _, err := p.take(int(length[0])); err != nil {
			return err
		}
	}
	return nil
}

func (p *parser) commands() error {
	for range maxCommands {
		m, err := p.mark()
		if err != nil || m != command {
			return err
		}
		head, err := p.take(5)
		if err != nil {
			return err
		}
		data, err := p.take(int(binary.BigEndian.Uint16(head[3:])))
		if err != nil {
			return err
		}
		if done, err := p.answer(binary.BigEndian.Uint16(head[1:]), data); done || err != nil {
			if err != nil {
				return err
			}
			continue
		}
		if err := errors.Join(p.put(head), p.put(data)); err != nil {
			return err
		}
	}
	return p.malformed("more than %d commands", maxCommands)
}

func (p *parser) ram() error {
	m, err := p.mark()
	if err != nil {
		return err
	}
	if m != sectionStart {
		return p.malformed("section type %#x where the ram section should start", m)
	}
	b, err := p.pass(6)
	if err != nil {
		return err
	}
	name, err := p.pass(int(b[5]))
	if err != nil {
		return err
	}
	if string(name) != "ram" {
		return p.malformed("section %q comes before ram", name)
	}
	ids, err := p.pass(8)
	if err != nil {
		return err
	}
	if v := binary.BigEndian.Uint32(ids[4:]); v != ramVersion {
		return p.malformed("ram section version %d, not %d", v, ramVersion)
	}
	return p.blocks()
}

func (p *parser) blocks() error {
	b, err := p.pass(8)
	if err != nil {
		return err
	}
	total := binary.BigEndian.Uint64(b)
	if flags := total & pageMask; flags != flagMemSize {
		return p.malformed("ram set-up has the flags %#x, not %#x", flags, flagMemSize)
	}
	left := total &^ uint64(pageMask)
	if left > maxRAM {
		return p.malformed("%d bytes of RAM", left)
	}
	for range maxBlocks {
		if left == 0 {
			return nil
		}
		length, err := p.block()
		if err != nil {
			return err
		}
		if length == 0 || length > left {
			return p.malformed("a block of %d bytes where %d are left", length, left)
		}
		left -= length
	}
	return p.malformed("more than %d blocks of RAM", maxBlocks)
}

// block passes a block's name and length on and drops its address.
func (p *parser) block() (length uint64, err error) {
	n, err := p.pass(1)
	if err != nil {
		return 0, err
	}
	if _, err := p.pass(int(n[0])); err != nil {
		return 0, err
	}
	b, err := p.pass(8)
	if err != nil {
		return 0, err
	}
	if _, err := p.take(8); err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}
