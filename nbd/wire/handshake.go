package wire

import (
	"encoding/binary"
	"fmt"
)

// Sizes of the fixed parts of the handshake, in bytes.
const (
	GreetingSize          = 18
	ClientFlagsSize       = 4
	OptionHeaderSize      = 16
	OptionReplyHeaderSize = 20
)

const (
	magicGreeting    = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption      = 0x49484156454f5054 // "IHAVEOPT"
	magicOptionReply = 0x0003e889045565a9

	greetingFixedNewstyle = 1 << 0
	greetingNoZeroes      = 1 << 1

	exportNamePadding = 124
)

// ClientFlags answer the greeting.
type ClientFlags uint32

// The flags a client may set.
const (
	ClientFixedNewstyle ClientFlags = 1 << 0
	ClientNoZeroes      ClientFlags = 1 << 1
)

// TransmissionFlags tell what an export can do.
type TransmissionFlags uint16

// The transmission flags.
const (
	FlagHasFlags        TransmissionFlags = 1 << 0
	FlagReadOnly        TransmissionFlags = 1 << 1
	FlagSendFlush       TransmissionFlags = 1 << 2
	FlagSendFUA         TransmissionFlags = 1 << 3
	FlagRotational      TransmissionFlags = 1 << 4
	FlagSendTrim        TransmissionFlags = 1 << 5
	FlagSendWriteZeroes TransmissionFlags = 1 << 6
	FlagSendDF          TransmissionFlags = 1 << 7
	FlagCanMultiConn    TransmissionFlags = 1 << 8
	FlagSendCache       TransmissionFlags = 1 << 10
	FlagSendFastZero    TransmissionFlags = 1 << 11
)

// Option is the type of a handshake option.
type Option uint32

// The options ("Option types").
const (
	OptExportName      Option = 1
	OptAbort           Option = 2
	OptList            Option = 3
	OptStartTLS        Option = 5
	OptInfo            Option = 6
	OptGo              Option = 7
	OptStructuredReply Option = 8
	OptListMetaContext Option = 9
	OptSetMetaContext  Option = 10
)

// OptionReply is the type of a reply to an option.
type OptionReply uint32

// The reply types ("Option reply types").
const (
	RepAck              OptionReply = 1
	RepServer           OptionReply = 2
	RepInfo             OptionReply = 3
	RepMetaContext      OptionReply = 4
	RepErrUnsupported   OptionReply = 1<<31 + 1
	RepErrPolicy        OptionReply = 1<<31 + 2
	RepErrInvalid       OptionReply = 1<<31 + 3
	RepErrUnknown       OptionReply = 1<<31 + 6
	RepErrShutdown      OptionReply = 1<<31 + 7
	RepErrBlockSizeReqd OptionReply = 1<<31 + 8
	RepErrTooBig        OptionReply = 1<<31 + 9
)

// InfoType is a kind of information that OptInfo and OptGo ask for.
type InfoType uint16

// The information types.
const (
	InfoExport      InfoType = 0
	InfoName        InfoType = 1
	InfoDescription InfoType = 2
	InfoBlockSize   InfoType = 3
)

// AppendGreeting is the server's first message: fixed newstyle, and the padding
// of the export-name reply may be left out.
func AppendGreeting(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint64(dst, magicGreeting)
	dst = binary.BigEndian.AppendUint64(dst, magicOption)
	return binary.BigEndian.AppendUint16(dst, greetingFixedNewstyle|greetingNoZeroes)
}

// DecodeClientFlags reads the ClientFlagsSize bytes that answer the greeting. A
// flag that the greeting did not offer is an error: the server must then drop
// the connection.
func DecodeClientFlags(b []byte) (ClientFlags, error) {
	if len(b) != ClientFlagsSize {
		return 0, fmt.Errorf("%w: client flags of %d bytes", ErrMalformed, len(b))
	}
	f := ClientFlags(binary.BigEndian.Uint32(b))
	if unknown := f &^ (ClientFixedNewstyle | ClientNoZeroes); unknown != 0 {
		return 0, fmt.Errorf("%w: unknown client flags %#x", ErrMalformed, uint32(unknown))
	}
	return f, nil
}

// OptionHeader precedes LenBytes bytes of option data.
//
//	off  size  field
//	  0     8  magic     "IHAVEOPT"
//	  8     4  Option
//	 12     4  LenBytes  not checked here: the reader compares it with MaxOption
type OptionHeader struct {
	Option   Option
	LenBytes uint32
}

// DecodeOptionHeader reads OptionHeaderSize bytes.
func DecodeOptionHeader(b []byte) (OptionHeader, error) {
	if len(b) != OptionHeaderSize {
		return OptionHeader{}, fmt.Errorf("%w: option header of %d bytes", ErrMalformed, len(b))
	}
	if m := binary.BigEndian.Uint64(b); m != magicOption {
		return OptionHeader{}, fmt.Errorf("%w: option magic %#x", ErrMalformed, m)
	}
	return OptionHeader{
		Option:   Option(binary.BigEndian.Uint32(b[8:])),
		LenBytes: binary.BigEndian.Uint32(b[12:]),
	}, nil
}

// DecodeName reads the data of OptExportName: the name alone.
func DecodeName(b []byte) (string, error) {
	if len(b) > MaxName || !IsString(string(b)) {
		return "", fmt.Errorf("%w: export name of %d bytes is too long or not text", ErrMalformed, len(b))
	}
	return string(b), nil
}

// InfoRequest is the data of OptInfo and OptGo.
//
//	32 bits  length of Name
//	         Name
//	16 bits  number of Types
//	16 bits  each of Types
type InfoRequest struct {
	Name  string
	Types []InfoType
}

// DecodeInfoRequest reads the data of OptInfo or OptGo.
func DecodeInfoRequest(b []byte) (InfoRequest, error) {
	name, b, err := cutString(b)
	if err != nil {
		return InfoRequest{}, err
	}
	if len(b) < 2 {
		return InfoRequest{}, fmt.Errorf("%w: no count of information requests", ErrMalformed)
	}
	n := int(binary.BigEndian.Uint16(b))
	b = b[2:]
	if len(b) != 2*n {
		return InfoRequest{}, fmt.Errorf("%w: %d information requests in %d bytes", ErrMalformed, n, len(b))
	}
	r := InfoRequest{Name: name, Types: make([]InfoType, n)}
	for i := range r.Types {
		r.Types[i] = InfoType(binary.BigEndian.Uint16(b[2*i:]))
	}
	return r, nil
}

// MetaRequest is the data of OptListMetaContext and OptSetMetaContext.
//
//	32 bits  length of Name
//	         Name
//	32 bits  number of Queries, at most MaxQueries
//	         each of Queries: 32 bits of length, then the text
type MetaRequest struct {
	Name    string
	Queries []string
}

// DecodeMetaRequest reads the data of OptListMetaContext or OptSetMetaContext.
func DecodeMetaRequest(b []byte) (MetaRequest, error) {
	name, b, err := cutString(b)
	if err != nil {
		return MetaRequest{}, err
	}
	if len(b) < 4 {
		return MetaRequest{}, fmt.Errorf("%w: no count of metadata queries", ErrMalformed)
	}
	n := binary.BigEndian.Uint32(b)
	b = b[4:]
	if n > MaxQueries || int(n) > len(b)/4 {
		return MetaRequest{}, fmt.Errorf("%w: %d metadata queries in %d bytes", ErrMalformed, n, len(b))
	}
	r := MetaRequest{Name: name, Queries: make([]string, n)}
	for i := range r.Queries {
		if r.Queries[i], b, err = cutString(b); err != nil {
			return MetaRequest{}, err
		}
	}
	if len(b) != 0 {
		return MetaRequest{}, fmt.Errorf("%w: %d bytes after the last metadata query", ErrMalformed, len(b))
	}
	return r, nil
}

// cutString takes a string with a 32-bit length off the front of b.
func cutString(b []byte) (s string, rest []byte, err error) {
	if len(b) < 4 {
		return "", nil, fmt.Errorf("%w: no length of a string", ErrMalformed)
	}
	n := binary.BigEndian.Uint32(b)
	b = b[4:]
	if n > MaxName || int(n) > len(b) {
		return "", nil, fmt.Errorf("%w: string of %d bytes in %d", ErrMalformed, n, len(b))
	}
	s = string(b[:n])
	if !IsString(s) {
		return "", nil, fmt.Errorf("%w: string is not text", ErrMalformed)
	}
	return s, b[n:], nil
}
