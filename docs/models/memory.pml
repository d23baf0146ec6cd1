/* What two nodes have in memory only, what each has stored, and the flag that says which of both
   counts after all memory is lost.  One extent; its content is one bit: whether primary and
   secondary may differ.  What is in flight, embargo and reads are in coherence.pml.

   Nodes 0 and 1; m is the other one of n.  What the names stand for:
     own, oth, owed   R, P and O of the node, in its memory
     stored  its stored record L names the extent;  vol  flag VOLATILE in its superblock
     bad     its record device takes no writes;  hbad, hknown, hvol, sl   what HELLO and RECORD said
             of that, of its being fresh, of the flag, and of L
     relies  it counts on P of the other: a write waits for GRANT, and not for L
     settles the flag goes once L names R, P and O
     wait    a host's write waits;  res  it was granted and waits for L: the extent stays
     up      0 no link, 1 HELLO and RECORD sent, 2 the other's RECORD learnt, 3 READY sent, 4 paired

   Modes: -DRELY=1, 2, 3: record_on = partner at node 0, 1, both; else `both`.  -DSTORE:
   partner_ack = stored.  -DFAILS=1: a record device fails, once; the node relies on the other then
   (record_fallback).  -DSHARED: a survivor that knows nothing reads the other's stored record.

   Checked in every state:
     1. one node at most may write, and what it may write the other knows, if it knows anything;
     2. a node that knows names what differs, and it is dirty at whom it belongs to;
     3. if all memory is lost now, one stored record names what differs, or a flag is set;
   and where nothing goes on any more nobody waits, both are paired and nothing differs.
   -DBUG_...: a mistake that must give a counterexample; -DWITNESS_...: an end to be reached. */

#ifndef WRITES
#define WRITES 1           /* of the hosts of each node */
#endif
#ifndef CUTS
#define CUTS 0
#endif
#ifndef CRASHES
#define CRASHES 0
#endif
#ifndef FAILS
#define FAILS 0
#endif
#ifndef RELY
#define RELY 0
#endif

mtype = { ADD, GRANT, GOT, REMOVE, RECORD, READY };
chan q[2] = [6] of { mtype, bit, bit, bit };

bit own[2], oth[2], owed[2], stored[2], vol[2], bad[2];
bit alive[2], known[2], alone[2], relies[2], settles[2];
bit want[2], wait[2], res[2], asked[2], dirty[2];
bit hbad[2], hknown[2], hvol[2], sl[2];
byte up[2], writes[2], cuts, crashes, fails;
bit conn, differ, compared, united, blind;

#define SEND(m, t, a, b, c) \
  if :: conn -> assert(nfull(q[m])); q[m]!t(a, b, c) :: else fi

/* As HELLO of both said it. */
#define ASKS(n) (((RELY >> n) & 1) || hbad[n])
#ifdef BUG_RELIES_ON_FAILING
#define RELIES(n) ASKS(n)
#else
#define RELIES(n) (ASKS(n) && !hbad[1 - n])
#endif
#ifdef STORE
#define STORES_FIRST(n) (!hbad[n])
#else
#define STORES_FIRST(n) 0
#endif
#define IN_MEMORY ((RELIES(0) && !STORES_FIRST(1)) || (RELIES(1) && !STORES_FIRST(0)))

#ifdef BUG_STORED_IS_OWN_ONLY
#define NAMED(n) own[n]
#else
#define NAMED(n) (own[n] || oth[n] || owed[n])
#endif
#define ALL_STORED(n) (!NAMED(n) || stored[n])

inline flush_link() {
  conn = 0;
  do :: q[0]?_,_,_,_ :: q[1]?_,_,_,_ :: empty(q[0]) && empty(q[1]) -> break od
}
inline lose(n) {                           /* the node notices that the link is gone */
  if :: alone[n] && up[n] < 3 -> skip :: else -> alone[n] = 0 fi;
  up[n] = 0; want[n] = 0; asked[n] = 0; relies[n] = 0;
  if
  :: known[n] -> settles[n] = 1
  :: else -> own[n] = 0; oth[n] = 0; owed[n] = 0; dirty[n] = 0
#ifdef BUG_FRESH_CLEARS_FLAG
     ; settles[n] = 1
#endif
  fi
}
inline die(n) {
  flush_link();
  alive[n] = 0; known[n] = 0; alone[n] = 0; relies[n] = 0; settles[n] = 0; up[n] = 0;
  own[n] = 0; oth[n] = 0; owed[n] = 0; want[n] = 0; wait[n] = 0; res[n] = 0; asked[n] = 0;
  dirty[n] = 0; sl[n] = 0;
  crashes++
}
#ifdef BUG_RECORD_OF_START
#define AT_HELLO(n) sl[n]
#else
#define AT_HELLO(n) (stored[n] && !known[n])    /* with what was learnt before a link was lost */
#endif
inline start(n) {
  alive[n] = 1;
#ifdef BUG_RECORD_OF_START
  sl[n] = stored[n]
#endif
}
inline take_over(n) {                      /* what was the other's, or may have been */
  if :: oth[n] || owed[n] -> own[n] = 1; dirty[n] = 1 :: else fi;
  oth[n] = 0; owed[n] = 0
}
inline submit(n) { wait[n] = 0; res[n] = 0; differ = 1; dirty[n] = 1 }

proctype Node(bit n) {
  bit m, a, b, c, mine;
  m = 1 - n;
  do
  /* -- hosts, the copier, and the stored record ------------------------------------------------ */
  :: atomic { alive[n] && writes[n] && !wait[n] && known[n] -> writes[n]--; wait[n] = 1 }
  :: atomic { wait[n] && own[n] && (stored[n] || relies[n]) && (!asked[n] || res[n]) -> submit(n) }
  :: atomic { wait[n] && !own[n] && alone[n] && !up[n] && !bad[n] -> own[n] = 1 }
  :: atomic { wait[n] && !own[n] && !want[n] && up[n] == 4 -> want[n] = 1; SEND(m, ADD, 0, 0, 0) }
  :: atomic { alive[n] && (own[n] || oth[n] || owed[n]) && !stored[n] && !bad[n] -> stored[n] = 1 }
  :: atomic { own[n] && dirty[n] && (up[n] == 0 || up[n] == 4) -> dirty[n] = 0; differ = 0 }
  :: atomic { own[n] && !dirty[n] && !wait[n] && !asked[n] && (up[n] == 0 || up[n] == 4) ->
       own[n] = 0; if :: !bad[n] -> stored[n] = 0 :: true fi;
       if :: up[n] == 4 -> SEND(m, REMOVE, 0, 0, 0) :: else fi }
  /* -- the flag goes ---------------------------------------------------------------------------- */
#ifdef BUG_EXCHANGE_CLEARS_FLAG
  :: atomic { alive[n] && settles[n] && vol[n] && !bad[n] && ALL_STORED(n) -> vol[n] = 0 }
#elif defined(BUG_FLAG_BEFORE_DESTAGE)
  :: atomic { alive[n] && settles[n] && (up[n] == 0 || up[n] == 4) && vol[n] && !bad[n] -> vol[n] = 0 }
#else
  :: atomic { alive[n] && settles[n] && (up[n] == 0 || up[n] == 4) && vol[n] && !bad[n] && ALL_STORED(n) ->
       vol[n] = 0 }
#endif
  /* -- rights change ---------------------------------------------------------------------------- */
  :: atomic { asked[n] && own[n] && !res[n] && up[n] == 4 && (!STORES_FIRST(n) || stored[n]) ->
       own[n] = 0; owed[n] = 1; asked[n] = 0; SEND(m, GRANT, dirty[n], 0, 0); dirty[n] = 0;
#ifdef BUG_OWED_IS_DROPPED
       if :: !bad[n] -> stored[n] = 0 :: else fi
#endif
     }
#ifndef BUG_GRANTS_UNSTORED
  :: atomic { alive[n] && up[n] == 4 && q[n]?[ADD] && STORES_FIRST(n) && !stored[n] && !bad[n] -> stored[n] = 1 }
  :: atomic { alive[n] && up[n] == 4 && q[n]?[ADD] && (!STORES_FIRST(n) || stored[n]) -> q[n]?ADD(_, _, _);
#else
  :: atomic { alive[n] && up[n] == 4 && q[n]?[ADD] -> q[n]?ADD(_, _, _);
#endif
       if
       :: own[n] || (want[n] && n == 0 && !owed[n]) -> asked[n] = 1          /* crossing: 0 first */
       :: !own[n] && owed[n] -> skip
       :: !own[n] && !owed[n] && !(want[n] && n == 0) -> oth[n] = 1; SEND(m, GRANT, 0, 0, 0)
       fi }
  :: atomic { alive[n] && up[n] == 4 && q[n]?[GRANT] -> q[n]?GRANT(a, _, _);
       c = oth[n] || owed[n]; own[n] = 1; oth[n] = 0; owed[n] = 0; want[n] = 0; res[n] = wait[n];
       dirty[n] = a;
       if :: c -> SEND(m, GOT, 0, 0, 0) :: else fi; a = 0; c = 0 }
  :: atomic { alive[n] && up[n] == 4 && q[n]?[GOT] -> q[n]?GOT(_, _, _);
       if :: owed[n] -> owed[n] = 0; oth[n] = 1 :: else fi;
#ifdef BUG_OTHER_IS_DROPPED
       if :: !bad[n] && oth[n] -> stored[n] = 0 :: else fi
#endif
     }
  :: atomic { alive[n] && up[n] == 4 && q[n]?[REMOVE] -> q[n]?REMOVE(_, _, _);
       oth[n] = 0; if :: !own[n] && !owed[n] && !bad[n] -> stored[n] = 0 :: true fi }
  /* -- the exchange ------------------------------------------------------------------------------ */
  :: atomic { alive[n] && up[n] && !conn -> lose(n); a = 0; b = 0; c = 0 }
  :: atomic { alive[n] && up[n] == 4 && conn && bad[n] != hbad[n] -> flush_link() }    /* begins anew */
  :: atomic { alive[n] && up[n] == 1 && q[n]?[RECORD] -> q[n]?RECORD(a, b, c);
       assert(!(own[n] && a));
       if :: !own[n] && (a || b || (!known[n] && sl[n]) || (!known[n] && !hknown[m] && c)) -> oth[n] = 1
       :: else fi;
       if :: !known[n] && !hknown[m] && (hvol[0] || hvol[1]) -> oth[n] = 1 :: else fi;
       if :: known[n] && !hknown[m] && c && !own[n] -> owed[n] = 1 :: else fi;
       up[n] = 2 }
#ifdef BUG_READY_UNSTORED
  :: atomic { alive[n] && up[n] == 2 && conn ->
#else
  :: atomic { alive[n] && up[n] == 2 && conn && (!STORES_FIRST(n) || ALL_STORED(n)) ->
#endif
       if
#if defined(BUG_NO_FLAG) || defined(BUG_READY_BEFORE_FLAG)
       :: true -> up[n] = 3; SEND(m, READY, 0, 0, 0)
#else
       :: IN_MEMORY && !hbad[n] && bad[n] -> flush_link()
       :: IN_MEMORY && !hbad[n] && !bad[n] -> vol[n] = 1; up[n] = 3; SEND(m, READY, 0, 0, 0)
       :: !IN_MEMORY || hbad[n] -> up[n] = 3; SEND(m, READY, 0, 0, 0)
#endif
       fi }
#ifdef BUG_READY_BEFORE_FLAG
  :: atomic { alive[n] && up[n] >= 3 && IN_MEMORY && !vol[n] && !bad[n] -> vol[n] = 1 }
#endif
  :: atomic { alive[n] && up[n] == 3 && q[n]?[READY] -> q[n]?READY(_, _, _);
       mine = 0;
       if
       :: hknown[n] && hknown[m] ->
          if
          :: own[n] -> mine = 1
          :: !own[n] && owed[n] && !a && (!b || n == 0) -> mine = 1; dirty[n] = 1
          :: else
          fi;
          oth[n] = !mine && (a || b)
       :: hknown[n] && !hknown[m] ->
          mine = own[n] || c; oth[n] = 0;
          if :: mine && !own[n] -> dirty[n] = 1 :: else fi
       :: !hknown[n] && hknown[m] -> oth[n] = a || b || sl[n]
       :: !hknown[n] && !hknown[m] ->
          if
#ifdef BUG_ONLY_OWN_FLAG
          :: hvol[n] -> mine = (n == 0); oth[n] = (n == 1); compared = 1
          :: !hvol[n] ->
#else
          :: hvol[0] || hvol[1] -> mine = (n == 0); oth[n] = (n == 1); compared = 1
          :: !hvol[0] && !hvol[1] ->
#endif
             mine = sl[n] && (!c || n == 0); oth[n] = c && !mine;
             united = united || mine
          fi;
          if :: mine -> dirty[n] = 1 :: else fi
       fi;
       own[n] = mine; owed[n] = 0; known[n] = 1; up[n] = 4; sl[n] = 0;
       a = 0; b = 0; c = 0; mine = 0;
       relies[n] = RELIES(n);
       if :: !IN_MEMORY -> settles[n] = 1 :: else fi }
  /* -- taking over: the other is proven dead, and that is durable ------------------------------- */
  :: atomic { alive[n] && !up[n] && !conn && !alone[n] && !bad[n] && crashes < CRASHES ->
       if :: alive[m] -> die(m) :: else -> crashes++ fi;
       if
       :: known[n] -> take_over(n)
#ifdef SHARED
#ifdef BUG_FLAG_UNREAD
       :: !known[n] -> own[n] = stored[0] || stored[1]; blind = blind || own[n]
#else
       :: !known[n] && !vol[0] && !vol[1] -> own[n] = stored[0] || stored[1]; blind = blind || own[n]
       :: !known[n] && (vol[0] || vol[1]) -> own[n] = 1; compared = 1
#endif
#else
       :: !known[n] -> own[n] = 1; compared = 1
#endif
       fi;
       if :: !known[n] -> dirty[n] = own[n] :: else fi;
       known[n] = 1; alone[n] = 1; settles[n] = 1 }
  od
}

proctype World() {
  do
  :: atomic { conn && cuts < CUTS -> cuts++; flush_link() }
  :: atomic { !conn && alive[0] && alive[1] && !up[0] && !up[1] && !(alone[0] && alone[1]) ->
       conn = 1; hknown[0] = known[0]; hknown[1] = known[1];
       hbad[0] = bad[0]; hbad[1] = bad[1]; hvol[0] = vol[0]; hvol[1] = vol[1];
       if :: known[0] && !known[1] -> take_over(0) :: else fi;
       if :: known[1] && !known[0] -> take_over(1) :: else fi;
#ifndef BUG_EXCHANGE_CLEARS_FLAG
       settles[0] = 0; settles[1] = 0;
#endif
       up[0] = 1; up[1] = 1; sl[0] = AT_HELLO(0); sl[1] = AT_HELLO(1);
       q[1]!RECORD(own[0], owed[0], sl[0]);
       q[0]!RECORD(own[1], owed[1], sl[1]) }
  :: atomic { crashes < CRASHES && alive[0] -> die(0) }
  :: atomic { crashes < CRASHES && alive[1] -> die(1) }
  :: atomic { !alive[0] && !conn && !bad[0] -> start(0) }
  :: atomic { !alive[1] && !conn && !bad[1] -> start(1) }
  :: atomic { fails < FAILS -> fails++; if :: bad[0] = 1 :: bad[1] = 1 fi }
  :: atomic { bad[0] -> bad[0] = 0 }
  :: atomic { bad[1] -> bad[1] = 0 }
  od
}

#define KNOWS(n) (alive[n] && known[n])
#define NAMES(n) (own[n] || oth[n] || owed[n])
proctype Monitor() {
  atomic {
    (   (own[0] && own[1])
     || (own[0] && KNOWS(1) && !oth[1] && !owed[1]) || (own[1] && KNOWS(0) && !oth[0] && !owed[0])
     || (differ && KNOWS(0) && !NAMES(0)) || (differ && KNOWS(1) && !NAMES(1))
     || (differ && own[0] && !dirty[0]) || (differ && own[1] && !dirty[1])
     || (differ && !vol[0] && !vol[1] && !stored[0] && !stored[1])
#ifdef WITNESS_COMPARED
     || (compared && up[0] == 4 && up[1] == 4 && !differ && !dirty[0] && !own[0])
#endif
#ifdef WITNESS_UNION
     || (united && RELY && !compared && up[0] == 4 && up[1] == 4 && !differ && !writes[0] && !writes[1])
#endif
#ifdef WITNESS_STOOD_IN
     || (bad[0] && relies[0] && differ && own[0] && !stored[0])
#endif
#ifdef WITNESS_READ
     || (blind && !compared && up[0] == 4 && up[1] == 4 && !differ)
#endif
    ) -> assert(false)
  }
}
proctype Rest() {
  timeout ->
  assert(alive[0] && alive[1] && up[0] == 4 && up[1] == 4);
  assert(!wait[0] && !wait[1] && !writes[0] && !writes[1] && !differ)
}
init {
  atomic {
    alive[0] = 1; alive[1] = 1; writes[0] = WRITES; writes[1] = WRITES;
    run Node(0); run Node(1); run World(); run Monitor(); run Rest()
  }
}
