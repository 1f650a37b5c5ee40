package devstate

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
)

// The commands of a return path, and the messages that come back on it: be16
// type, be16 length, data.
const (
	cmdOpenReturnPath = 1
	cmdPing           = 2 // be32 value

	msgShut          = 1 // be32 error: the destination has all it wants
	msgPong          = 2 // be32 value of the ping
	msgSwitchoverAck = 7 // no data: the source may stop the guest
)

// Marks at the end of a stream.
const (
	endOfFile   = 0x00
	description = 0x06 // be32 n, n bytes of JSON that describe the sections
)

// maxDescription bounds the description at the end, in bytes.
const maxDescription = 4 << 20

// Converse is Rewrite for a QEMU that has opened a return path on conn, as one
// of libvirt does: it takes the return path's commands out of the stream and
// plays the destination's part. QEMU holds its migration for complete when it
// is told so there, which this does once the whole stream has been read; whether
// it loads, the caller has to find out.
//
// acknowledge has it allow the switchover at once. A QEMU on which somebody has
// turned the capability switchover-ack on goes round and round until it is
// allowed to; one that does not have the capability, older than 8.1, breaks the
// migration off when it is.
//
// That the stream has come to its end is seen from the JSON description with
// which QEMU ends it. A machine type without one (of before 2015) does not end.
func Converse(w io.Writer, conn io.ReadWriter, acknowledge bool) error {
	p := &parser{r: bufio.NewReaderSize(conn, 64<<10), w: bufio.NewWriterSize(w, 64<<10), back: conn, ack: acknowledge}
	err := p.header()
	if flushErr := p.w.Flush(); err == nil {
		err = flushErr
	}
	if err != nil {
		return err
	}
	return p.converse(w)
}

// answer does what a return path's command asks for, and says whether it was
// one.
func (p *parser) answer(kind uint16, data []byte) (bool, error) {
	switch {
	case p.back == nil:
		return false, nil
	case kind == cmdOpenReturnPath && len(data) == 0:
		p.opened = true
		if !p.ack {
			return true, nil
		}
		return true, p.say(msgSwitchoverAck, nil)
	case kind == cmdPing && len(data) == 4:
		return true, p.say(msgPong, data)
	}
	return false, nil
}

// say sends a message on the return path.
func (p *parser) say(kind uint16, data []byte) error {
	b := binary.BigEndian.AppendUint16(nil, kind)
	b = binary.BigEndian.AppendUint16(b, uint16(len(data)))
	if _, err := p.back.Write(append(b, data...)); err != nil {
		return p.fail(fmt.Errorf("return path: %w", err))
	}
	return nil
}

// converse passes the rest on and says when it is complete.
func (p *parser) converse(w io.Writer) error {
	p.part = "devices"
	buf := make([]byte, 64<<10)
	var tail []byte
	said := false
	for {
		n, err := p.r.Read(buf)
		p.offset += int64(n)
		if _, werr := w.Write(buf[:n]); werr != nil {
			return p.fail(werr)
		}
		if err == io.EOF {
			if p.opened && !said {
				return p.fail(io.ErrUnexpectedEOF)
			}
			return nil
		}
		if err != nil {
			return p.fail(err)
		}
		if tail = append(tail, buf[:n]...); len(tail) > 2*maxDescription {
			tail = append(tail[:0], tail[len(tail)-maxDescription:]...)
		}
		if p.opened && !said && complete(tail) {
			said = true
			if err := p.say(msgShut, make([]byte, 4)); err != nil {
				return err
			}
		}
	}
}

// complete says whether a stream ends here: with the end mark and a description
// of just the length that is left.
func complete(tail []byte) bool {
	if !bytes.HasSuffix(tail, []byte("}")) {
		return false
	}
	for at := 0; ; at++ {
		next := bytes.Index(tail[at:], []byte{endOfFile, description})
		if next < 0 {
			return false
		}
		at += next
		rest := tail[at+2:]
		if len(rest) < 6 {
			return false
		}
		if binary.BigEndian.Uint32(rest) == uint32(len(rest)-4) && rest[4] == '{' && json.Valid(rest[4:]) {
			return true
		}
	}
}
