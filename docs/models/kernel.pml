/* A node attached with device-mapper: its kernel writes recorded places past bitmapd, and goes on when
   that dies.  Node 0 has the kernel, node 1 is its partner; one of them serves hosts at a time.  One
   extent; its content is one bit: whether primary and secondary may differ.

   What the names stand for, as in coherence.pml:
     own, oth, owed   R, P and O of each node;  stored   it is in the node's stored record
     dirty   it is to be copied;  want, wait   an ADD is under way; a host's write waits
     known, alone, hk   as there; `known` as HELLO said it;  sl, ro, rw, rs   what both RECORDs said
     up   0 no link, 1 HELLO said, 2 RECORD sent, 3 learnt and READY sent, 4 paired
   and of the kernel of node 0:
     stack   hosts of node 0 have their device;  direct   its table sends their writes to the primary,
             so the extent is in R';  kw   such a write is on its way;  sw   one of node 1's hosts
     serves  hosts are let in at node 1

   A process of node 0 that begins beside such a kernel owns R', dirty, whatever else it knows.  Its
   HELLO says DIRECT, so node 1 waits for its RECORD before it takes over what the old process had.
   A fence ends the kernel, too, and so does node 0 before it says TAKEN.

   Checked in every state:
     1. what the kernel writes is not node 1's, a node 1 that knows has it in P or O, and it is in
        one of the stored records;
     2. two nodes never write at once;
     3. where both sides differ each live node that knows has the extent, and one of the stored
        records does;
   and where nothing goes on any more both are paired, nobody waits and nothing differs. */

#ifndef CUTS
#define CUTS 1
#endif
#ifndef CRASHES
#define CRASHES 2
#endif
#ifndef WRITES
#define WRITES 2
#endif
#ifndef TAKES
#define TAKES 0
#endif

mtype = { ADD, GRANT, GOT, REMOVE, RECORD, READY, TAKE, TAKEN };
chan q[2] = [5] of { mtype, bit, bit, bit };

bit own[2], oth[2], owed[2], stored[2], dirty[2], want[2], wait[2];
bit known[2] = 1, alive[2] = 1, alone[2], hk[2], sl[2], ro[2], rw[2], rs[2];
bit conn = 1, stack = 1, direct, kw, sw, serves, differ, giving[2], outlived, absorbed;
byte up[2] = 4, writes = WRITES, cuts, crashes, takes;

#define SEND(m, t, a, b, c) if :: conn -> assert(nfull(q[m])); q[m]!t(a, b, c) :: else fi
#ifdef BUG_ADOPTED_CLEAN
#define CLEAN direct
#else
#define CLEAN 0
#endif
#define SERVES(n) (n == 0 -> stack : serves)
#define LEARN(n) oth[n] = !own[n] && !owed[n]

inline flush_link() { conn = 0; do :: q[0]?_,_,_,_ :: q[1]?_,_,_,_ :: empty(q[0]) && empty(q[1]) -> break od }
inline forget(n) {
  known[n] = 0; alone[n] = 0; up[n] = 0; own[n] = 0; oth[n] = 0; owed[n] = 0; dirty[n] = 0;
  want[n] = 0; wait[n] = 0; giving[n] = 0; ro[n] = 0; rw[n] = 0; rs[n] = 0; sl[n] = 0; hk[n] = 0
}
/* What was on its way lands or does not, and nothing comes after it. */
inline end_kernel() { if :: kw -> differ = 1 :: true fi; kw = 0; direct = 0; stack = 0 }
inline end_hosts() { if :: sw -> differ = 1 :: true fi; sw = 0; serves = 0 }
inline inherit(n) { own[n] = 1; oth[n] = 0; owed[n] = 0; dirty[n] = 1 }
inline send_record(n) { sl[n] = stored[n]; SEND(1 - n, RECORD, own[n], owed[n], stored[n]); up[n] = 2 }

/* What share() gives: from what both have sent. */
inline thaw(n) {
  if
  :: hk[n] && hk[1 - n] ->
     if
     :: own[n] || ro[n] -> skip
     :: else -> if
        :: owed[n] && (n == 0 || !rw[n]) -> own[n] = 1; dirty[n] = 1
        :: rw[n] && !(owed[n] && n == 0) -> ro[n] = 1
        :: else -> skip
        fi
     fi
  :: !hk[n] && hk[1 - n] -> ro[n] = !own[n] && (ro[n] || rw[n] || sl[n]); dirty[n] = own[n] && !CLEAN
  :: hk[n] && !hk[1 - n] ->
     if :: !own[n] && !ro[n] && (owed[n] || rs[n]) -> own[n] = 1; dirty[n] = 1 :: else fi
  :: else ->
     if
     :: own[n] || ro[n] -> skip
     :: else ->
        if :: sl[n] && (n == 0 || !rs[n]) -> own[n] = 1 :: rs[n] && !(sl[n] && n == 0) -> ro[n] = 1
           :: else -> skip fi
     fi;
     dirty[n] = own[n] && !CLEAN
  fi;
  oth[n] = ro[n]; owed[n] = 0; ro[n] = 0; rw[n] = 0; rs[n] = 0; sl[n] = 0;
  known[n] = 1; alone[n] = 0; up[n] = 4
}

proctype Node(byte n) {
  bit a, b, c;
  do
  /* hosts, through the gate */
  :: atomic { alive[n] && known[n] && SERVES(n) && writes && !wait[n] && !(n == 0 && direct) -> writes--; wait[n] = 1 }
  :: atomic { wait[n] && own[n] && stored[n] && !giving[n] -> wait[n] = 0; dirty[n] = 1;
       if :: n == 0 -> differ = 1 :: else -> sw = 1 fi }
  :: atomic { n == 1 && sw -> sw = 0; differ = 1 }
  :: atomic { wait[n] && !own[n] && alone[n] && !up[n] -> own[n] = 1 }
  :: atomic { wait[n] && !own[n] && !want[n] && up[n] == 4 && !owed[n] -> want[n] = 1; SEND(1 - n, ADD, 0, 0, 0) }
  :: atomic { alive[n] && !stored[n] && (own[n] || oth[n] || owed[n]) -> stored[n] = 1 }
  :: atomic { alive[n] && known[n] && stored[n] && !own[n] && !oth[n] && !owed[n] && (up[n] == 0 || up[n] == 4) -> stored[n] = 0 }
  /* the kernel's table */
#ifdef BUG_DIRECT_UNSTORED
  :: atomic { n == 0 && stack && alive[0] && known[0] && own[0] && !direct && !giving[0] -> direct = 1; dirty[0] = 1 }
#else
  :: atomic { n == 0 && stack && alive[0] && known[0] && own[0] && stored[0] && !direct && !giving[0] -> direct = 1; dirty[0] = 1 }
#endif
  :: atomic { n == 0 && stack && alive[0] && known[0] && direct && !kw -> direct = 0; dirty[0] = 1 }  /* a barrier */
  /* the copier: what the kernel writes is not clean before a barrier has said so */
#ifdef BUG_COPIED_IS_CLEAN
  :: atomic { own[n] && known[n] && dirty[n] && !sw -> differ = 0; dirty[n] = 0 }
#else
  :: atomic { own[n] && known[n] && dirty[n] && !sw -> differ = 0; dirty[n] = (n == 0 && direct) }
#endif
#ifdef BUG_DIRECT_IS_DROPPED
  :: atomic { own[n] && known[n] && !wait[n] && !giving[n] && !sw && (up[n] == 0 || up[n] == 4) && (!dirty[n] || n == 0 && direct) ->
#else
  :: atomic { own[n] && known[n] && !dirty[n] && !wait[n] && !giving[n] && !sw && (up[n] == 0 || up[n] == 4) ->
#endif
       own[n] = 0; if :: up[n] == 4 -> SEND(1 - n, REMOVE, 0, 0, 0) :: else fi }

  /* paired */
  :: atomic { alive[n] && up[n] == 4 && q[n]?[ADD] -> q[n]?ADD(_, _, _);
       if
       :: own[n] -> giving[n] = 1
       :: owed[n] -> skip
       :: !own[n] && !owed[n] && want[n] && n == 0 -> giving[n] = 1      /* node 1's goes first */
       :: else -> oth[n] = 1; SEND(1 - n, GRANT, 0, 0, 0)
       fi }
  :: atomic { giving[n] && own[n] && up[n] == 4 && !sw ->
       giving[n] = 0; own[n] = 0; owed[n] = 1; a = dirty[n]; dirty[n] = 0; SEND(1 - n, GRANT, 1, a, 0); a = 0 }
  :: atomic { alive[n] && up[n] == 4 && q[n]?[GRANT] -> q[n]?GRANT(a, b, _);
       if :: a || oth[n] -> SEND(1 - n, GOT, 0, 0, 0) :: else fi;
       own[n] = 1; oth[n] = 0; want[n] = 0; if :: b -> dirty[n] = 1 :: else fi; a = 0; b = 0 }
  :: atomic { alive[n] && up[n] == 4 && q[n]?[GOT] -> q[n]?GOT(_, _, _); if :: owed[n] -> owed[n] = 0; oth[n] = 1 :: else fi }
  :: atomic { alive[n] && up[n] == 4 && q[n]?[REMOVE] -> q[n]?REMOVE(_, _, _); oth[n] = 0; owed[n] = 0 }
  /* a planned takeover: hosts off, the stack down, everything given, TAKEN */
  :: atomic { alive[n] && up[n] == 4 && takes < TAKES && !SERVES(n) && SERVES(1 - n) -> takes++; SEND(1 - n, TAKE, 0, 0, 0) }
  :: atomic { alive[n] && up[n] == 4 && q[n]?[TAKE] -> q[n]?TAKE(_, _, _); wait[n] = 0;
#ifdef BUG_TAKEN_BEFORE_THE_STACK_IS_DOWN
       if :: n == 1 -> end_hosts() :: else fi;
#else
       if :: n == 0 -> if :: direct -> dirty[0] = 1 :: else fi; end_kernel() :: n == 1 -> end_hosts() fi;
#endif
       if :: own[n] -> giving[n] = 1 :: else fi;
       SEND(1 - n, TAKEN, 0, 0, 0) }
  :: atomic { alive[n] && up[n] == 4 && q[n]?[TAKEN] -> q[n]?TAKEN(_, _, _); if :: n == 0 -> stack = 1 :: else -> serves = 1 fi }

  /* the link is lost */
  :: atomic { alive[n] && up[n] && !conn ->
       if :: alone[n] && up[n] < 3 -> skip :: else -> alone[n] = 0 fi;
       up[n] = 0; want[n] = 0; giving[n] = 0; ro[n] = 0; rw[n] = 0; rs[n] = 0; sl[n] = 0; hk[n] = 0 }

  /* the exchange */
  :: atomic { alive[n] && conn && up[n] == 1 && (n == 0 || alone[1] || hk[0] || !hk[1]) ->
       if :: hk[n] && !hk[1 - n] && !alone[n] && (oth[n] || owed[n]) -> inherit(n) :: else fi;
       send_record(n) }
#ifdef BUG_TAKEN_OVER_AT_HELLO
  :: atomic { alive[1] && conn && n == 1 && up[1] == 1 && hk[1] && !hk[0] && !alone[1] ->
       if :: oth[1] || owed[1] -> inherit(1); absorbed = 1 :: else fi; send_record(1) }
#else
  :: atomic { alive[1] && conn && n == 1 && up[1] == 1 && hk[1] && !hk[0] && !alone[1] && q[1]?[RECORD] ->
       q[1]?<RECORD(a, b, c)>;
       if :: !a && (oth[1] || owed[1]) -> inherit(1); absorbed = 1 :: else fi;
       a = 0; b = 0; c = 0; send_record(1) }
#endif
  :: atomic { alive[n] && conn && up[n] == 2 && q[n]?[RECORD] -> q[n]?RECORD(a, b, c);
       ro[n] = a; rw[n] = b; rs[n] = c; a = 0; b = 0; c = 0;
       if
       :: !own[n] && !owed[n] && (ro[n] || rw[n] || !hk[n] && (sl[n] || !hk[1 - n] && rs[n])) -> oth[n] = 1
       :: hk[n] && !hk[1 - n] && rs[n] && !ro[n] && !own[n] -> owed[n] = 1; oth[n] = 0
       :: else -> skip
       fi;
       up[n] = 3; SEND(1 - n, READY, 0, 0, 0) }
  :: atomic { alive[n] && up[n] == 3 && q[n]?[READY] -> q[n]?READY(_, _, _);
       if :: n == 0 && direct && !known[0] -> outlived = 1 :: else fi; thaw(n) }
  od
}

active proctype World() {
  do
  /* The kernel, whether bitmapd lives or not. */
  :: atomic { stack && direct && writes && !kw -> writes--; kw = 1 }
  :: atomic { kw -> kw = 0; differ = 1 }

  :: atomic { conn && cuts < CUTS -> cuts++; flush_link() }
  :: atomic { conn && (!alive[0] && empty(q[1]) || !alive[1] && empty(q[0])) -> flush_link() }
  :: atomic { !conn && alive[0] && alive[1] && !up[0] && !up[1] ->
       conn = 1; up[0] = 1; up[1] = 1; hk[0] = known[0]; hk[1] = known[1] }
  :: atomic { crashes < CRASHES && alive[0] -> crashes++; flush_link(); alive[0] = 0; forget(0) }
  :: atomic { crashes < CRASHES && alive[1] -> crashes++; flush_link(); alive[1] = 0; end_hosts(); forget(1) }
  :: atomic { !alive[0] && stack && !direct -> end_kernel() }     /* its hosts hang, or go away */
  :: atomic { !alive[0] && stack && direct && crashes < CRASHES -> crashes++; end_kernel() }  /* the machine dies, too */
  :: atomic { !alive[0] && !conn -> alive[0] = 1;
#ifndef BUG_DIRECT_UNSAID
       own[0] = direct;
#endif
       dirty[0] = own[0] && !CLEAN
     }
  :: atomic { !alive[1] && !conn -> alive[1] = 1 }
  /* A fence, and what it proves; the other's process is dead afterwards. */
  :: atomic { !conn && alive[1] && !up[1] && !alone[1] && crashes < CRASHES ->
       crashes++; alive[0] = 0; forget(0);
#ifndef BUG_FENCE_LEAVES_THE_KERNEL
       end_kernel();
#endif
       if :: oth[1] || owed[1] || !known[1] -> inherit(1) :: else fi;
       known[1] = 1; alone[1] = 1; serves = 1 }
  :: atomic { !conn && alive[0] && !up[0] && !alone[0] && crashes < CRASHES ->
       crashes++; alive[1] = 0; end_hosts(); forget(1);
       if :: oth[0] || owed[0] || !known[0] -> inherit(0) :: else fi;
       known[0] = 1; alone[0] = 1; stack = 1 }
  od
}

#define KNOWS(n) (own[n] || oth[n] || owed[n])
active proctype Monitor() {
  atomic {
    (   (direct && own[1])
     || (direct && alive[1] && known[1] && !oth[1] && !owed[1])
     || (direct && !stored[0] && !stored[1])
     || (own[0] && own[1])
     || (kw && sw)
     || (differ && alive[0] && known[0] && !KNOWS(0))
     || (differ && alive[1] && known[1] && !KNOWS(1))
     || (differ && !stored[0] && !stored[1])
#ifdef WITNESS_OUTLIVED
     || (outlived && direct && kw && up[0] == 4 && up[1] == 4)
#endif
#ifdef WITNESS_REST_IS_TAKEN_OVER
     || (absorbed && up[0] == 4 && up[1] == 4 && stack)
#endif
#ifdef WITNESS_FENCED
     || (alone[1] && differ && serves && !alive[0])
#endif
    ) -> assert(false)
  }
}
active proctype Rest() {
  timeout -> assert(up[0] == 4 && up[1] == 4 && !wait[0] && !wait[1] && !differ)
}
init { atomic { run Node(0); run Node(1) } }
